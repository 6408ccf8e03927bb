package e2e_test

import (
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/test/missing"
)

// nodeFeatureRule is that of nfd.k8s-sigs.io/v1alpha1, as far as the example goes.
type nodeFeatureRule struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string
	Metadata   struct{ Name string }
	Spec       struct{ Rules []featureRule }
}

type featureRule struct {
	Name     string
	Labels   map[string]string
	Features []featureTerm   `yaml:"matchFeatures"`
	Any      []featureChoice `yaml:"matchAny"`
}

type featureChoice struct {
	Features []featureTerm `yaml:"matchFeatures"`
}

type featureTerm struct {
	Feature     string
	Expressions map[string]struct {
		Op    string
		Value []string
	} `yaml:"matchExpressions"`
}

// features are what Node Feature Discovery finds: attributes by the name of a feature.
type features map[string]map[string]string

// matches evaluates terms as the Customization guide of Node Feature Discovery says. All
// of them have to match.
func (f features) matches(t *testing.T, terms []featureTerm) bool {
	t.Helper()
	for _, term := range terms {
		for name, e := range term.Expressions {
			value, exists := f[term.Feature][name]
			var match bool
			switch e.Op {
			case "In":
				match = exists && slices.Contains(e.Value, value)
			case "DoesNotExist":
				match = !exists
			case "Gt":
				limit, err := strconv.Atoi(e.Value[0])
				if err != nil {
					t.Fatal(err)
				}
				number, err := strconv.Atoi(value)
				match = err == nil && number > limit
			default:
				t.Fatalf("this test does not know the operator %q", e.Op)
			}
			if !match {
				return false
			}
		}
	}
	return true
}

// nodeLabel is the example's label for a node, empty if it gives none.
func nodeLabel(t *testing.T, f features) string {
	t.Helper()
	var rule nodeFeatureRule
	strict := yaml.NewDecoder(strings.NewReader(read(t, "examples/kubernetes/node-feature-discovery/kernel.yaml")))
	strict.KnownFields(true)
	if err := strict.Decode(&rule); err != nil {
		t.Fatal(err)
	}
	if rule.APIVersion != "nfd.k8s-sigs.io/v1alpha1" || rule.Kind != "NodeFeatureRule" {
		t.Fatalf("the example is a %s of %s", rule.Kind, rule.APIVersion)
	}
	var label string
	for _, r := range rule.Spec.Rules {
		choice := func(c featureChoice) bool { return f.matches(t, c.Features) }
		if !f.matches(t, r.Features) || len(r.Any) > 0 && !slices.ContainsFunc(r.Any, choice) {
			continue
		}
		if label != "" {
			t.Errorf("two rules match %v", f)
		}
		label = r.Labels["selective-ksm"]
	}
	return label
}

// kernelFeatures are those of a kernel, as Node Feature Discovery takes them from its
// release and its configuration.
func kernelFeatures(release, config string) features {
	f := features{"kernel.config": {}, "kernel.version": {}}
	for line := range strings.Lines(config) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.HasPrefix(name, "CONFIG_") {
			f["kernel.config"][strings.TrimPrefix(name, "CONFIG_")] = strings.Trim(value, `"`)
		}
	}
	if m := regexp.MustCompile(`^(\d+)\.(\d+)`).FindStringSubmatch(release); m != nil {
		f["kernel.version"]["major"], f["kernel.version"]["minor"] = m[1], m[2]
	}
	return f
}

func TestNodeFeatureRule(t *testing.T) {
	series := read(t, "kernel/config/vm.config") + read(t, "kernel/config/selective-ksm.config")
	unpatched := read(t, "kernel/config/vm.config") + read(t, "kernel/config/option-off.config")
	without := strings.ReplaceAll(unpatched, "CONFIG_KSM=y", "# CONFIG_KSM is not set")
	for name, tc := range map[string]struct{ release, config, want string }{
		"the series":       {"6.12.117", series, "sysfs"},
		"unpatched":        {"6.12.117", unpatched, "mainline"},
		"first that does":  {"6.7.0-rc1", unpatched, "mainline"},
		"next":             {"7.0.3-1-cloud", unpatched, "mainline"},
		"last that is not": {"6.6.99", unpatched, ""},
		"old":              {"5.15.0", unpatched, ""},
		"without KSM":      {"6.12.117", without, ""},
		"no configuration": {"6.12.117", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			if got := nodeLabel(t, kernelFeatures(tc.release, tc.config)); got != tc.want {
				t.Errorf("the label is %q, want %q", got, tc.want)
			}
		})
	}
}

// The label of the kernel that runs is the first interface that the product finds in it.
func TestNodeFeatureRuleHere(t *testing.T) {
	needProgram(t)
	packed, err := os.ReadFile("/proc/config.gz")
	if err != nil {
		missing.Skip(t, "the kernel does not tell its configuration: %v", err)
	}
	unpacked, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		t.Fatal(err)
	}
	config, err := io.ReadAll(unpacked)
	if err != nil {
		t.Fatal(err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	// Its status is whether the engine could run here, which is more.
	said, _ := exec.CommandContext(deadline(t), program, "doctor").Output()
	var want string
	if m := regexp.MustCompile(`(?m)^interface (\w+): there`).FindSubmatch(said); m != nil {
		want = string(m[1])
	}
	if got := nodeLabel(t, kernelFeatures(unix.ByteSliceToString(name.Release[:]), string(config))); got != want {
		t.Errorf("the label is %q, want %q, as doctor says\n%s", got, want, said)
	}
}
