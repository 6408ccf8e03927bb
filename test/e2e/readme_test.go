package e2e_test

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/selective-ksm/selective-ksm/config"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
)

const project = "../.."

// readme returns the README's blocks of one language.
func readme(t *testing.T, language string) []string {
	t.Helper()
	var blocks []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(read(t, "README.md"), -1) {
		blocks = append(blocks, m[1])
	}
	if len(blocks) == 0 {
		t.Fatalf("the README has no %s", language)
	}
	return blocks
}

func read(t *testing.T, name string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(project, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// runBy is where the README's make commands are run: a file, and a line of it.
var runBy = map[string]struct{ file, line string }{
	"make demo": {"Makefile", "\t$(MAKE) demo"}, // as part of make test
	"make test": {".ci/run", "exec make test"},
}

// Whoever adds a command to the README makes sure that something runs it.
func TestReadmeCommands(t *testing.T) {
	for command := range strings.Lines(strings.Join(readme(t, "sh"), "")) {
		command = strings.TrimSpace(command)
		if command == readmePlugin || slices.Contains(readmeOperations, command) {
			continue
		}
		by, known := runBy[command]
		if !known {
			t.Errorf("no test runs %q", command)
			continue
		}
		if !strings.Contains(read(t, by.file), "\n"+by.line+"\n") {
			t.Errorf("%s does not run %q", by.file, command)
		}
	}
}

// The configuration in the README is the one that it says it is.
func TestReadmeConfiguration(t *testing.T) {
	for _, text := range readme(t, "yaml") {
		c, err := config.Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(c, config.Default()) {
			t.Errorf("in the README\n\t%+v\nthe defaults\n\t%+v", c, config.Default())
		}
	}
}

// readmePlugin is the README's command to run the plugin.
const readmePlugin = "selective-ksm plugin -config /etc/selective-ksm.yaml"

// With what the README says, word for word, containers are merged.
func TestReadmePlugin(t *testing.T) {
	n := sharedNode(t)
	args := strings.Fields(readmePlugin)[1:]
	path := args[len(args)-1]
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	if _, err := f.WriteString(readme(t, "yaml")[0]); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	const socket = "/var/run/nri/nri.sock"
	if err := os.MkdirAll(filepath.Dir(socket), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(n.NRISocket(), socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(socket) })

	p, err := plugin.StartArgs(deadline(t), program, args...)
	if err != nil {
		t.Fatal(err)
	}
	stopAfter(t, p)
	shop := run(t, n, nil, "shop", web(1), worker(1))
	waitMerged(t, shop.containers[0], shop.containers[1])
	unchanged(t, shop.containers...)
}
