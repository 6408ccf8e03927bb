package metrics

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/selective-ksm/selective-ksm/engine"
)

const examples = "../../examples/"

var (
	metricName  = regexp.MustCompile(prefix + `\w+`)
	reasonsAre  = regexp.MustCompile(`reason=~?"([^"]*)"`)
	legendLabel = regexp.MustCompile(`{{\s*(?:\$labels\.)?(\w+)\s*}}`)
)

// check fails the test unless an expression is about metrics and reasons that there are,
// and its brackets are closed. It returns how many metrics it names.
func check(t *testing.T, where, expr string) int {
	t.Helper()
	names := metricName.FindAllString(expr, -1)
	for _, name := range names {
		if !slices.Contains(all(t), name) {
			t.Errorf("%s: there is no metric %s", where, name)
		}
	}
	for _, m := range reasonsAre.FindAllStringSubmatch(expr, -1) {
		for reason := range strings.SplitSeq(m[1], "|") {
			if !slices.Contains(engine.Causes, engine.Cause(reason)) {
				t.Errorf("%s: there is no reason %s", where, reason)
			}
		}
	}
	for _, pair := range []string{"()", "{}", "[]"} {
		if strings.Count(expr, pair[:1]) != strings.Count(expr, pair[1:]) {
			t.Errorf("%s: %s are not closed in %s", where, pair, expr)
		}
	}
	return len(names)
}

// The labels that people are shown are those that the metrics have.
func checkLabels(t *testing.T, where, text string) {
	t.Helper()
	for _, m := range legendLabel.FindAllStringSubmatch(text, -1) {
		if !slices.Contains([]string{"instance", "partition", "state", "reason", "errno", "annotation", "interface"}, m[1]) {
			t.Errorf("%s: there is no label %s", where, m[1])
		}
	}
}

func TestDashboard(t *testing.T) {
	data, err := os.ReadFile(examples + "grafana/selective-ksm.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Templating struct {
			List []struct{ Name, Definition string }
		}
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	ids := map[int]bool{}
	for _, p := range dashboard.Panels {
		if ids[p.ID] || p.Title == "" || len(p.Targets) == 0 {
			t.Errorf("panel %d %q has %d queries", p.ID, p.Title, len(p.Targets))
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			if check(t, p.Title, target.Expr) == 0 {
				t.Errorf("%s: no metric of ours in %s", p.Title, target.Expr)
			}
			checkLabels(t, p.Title, target.LegendFormat)
		}
	}
	if len(ids) == 0 {
		t.Error("no panels")
	}
	for _, v := range dashboard.Templating.List {
		check(t, v.Name, v.Definition)
	}
}

func TestAlerts(t *testing.T) {
	data, err := os.ReadFile(examples + "prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var rules struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	decoder := yaml.NewDecoder(strings.NewReader(string(data)))
	decoder.KnownFields(true)
	if err := decoder.Decode(&rules); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, group := range rules.Groups {
		for _, rule := range group.Rules {
			n += check(t, rule.Alert, rule.Expr)
			for _, annotation := range []string{"summary", "description"} {
				if rule.Annotations[annotation] == "" {
					t.Errorf("%s has no %s", rule.Alert, annotation)
				}
				checkLabels(t, rule.Alert, rule.Annotations[annotation])
			}
			if rule.Labels["severity"] == "" {
				t.Errorf("%s has no severity", rule.Alert)
			}
		}
	}
	if n == 0 {
		t.Error("no alerts")
	}
}
