// Package config is what an operator decides: the settings of the daemon, read
// strictly from YAML, and the policy that gives each container its partition.
// Everything in it is a pure function of its arguments.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Scope is how far a partition reaches: whose memory may be merged with whose.
type Scope string

const (
	// ScopePod gives the containers of one pod sandbox a partition together.
	ScopePod Scope = "pod"
	// ScopeContainer gives each container a partition of its own.
	ScopeContainer Scope = "container"
)

// LogFormat is the form of a log line.
type LogFormat string

const (
	// LogText is for people.
	LogText LogFormat = "text"
	// LogJSON is one JSON object a line.
	LogJSON LogFormat = "json"
)

// Config is the configuration of the daemon. Its zero value is not valid: start
// from [Default].
type Config struct {
	// PartitionBy is the scope of the partitions.
	PartitionBy Scope
	// StartDelays are the times after a container's start at which its partition
	// is merged.
	StartDelays []time.Duration
	// Interval is the time from the end of one merge of a partition to its next.
	Interval time.Duration
	// Wrapper is the path of the static selective-ksm binary of which containers
	// get a copy, to opt their memory in. Empty means the running executable.
	Wrapper string
	// LogFile is the path of a file that the log is appended to. Empty means
	// standard error.
	LogFile string
	// LogLevel is the least severe level that is logged: error, warning, info or
	// debug.
	LogLevel string
	// LogFormat is the form of a log line.
	LogFormat LogFormat
}

const (
	minInterval    = time.Second
	maxStartDelays = 16
)

var logLevels = []string{"error", "warning", "info", "debug"}

// Default returns the configuration of a daemon that is given none.
func Default() Config {
	return Config{
		PartitionBy: ScopePod,
		// Not at once: for its first milliseconds a container is still the
		// runtime's init, whose memory is gone when the program starts.
		StartDelays: []time.Duration{time.Second, 10 * time.Second, time.Minute},
		Interval:    10 * time.Minute,
		LogLevel:    "info",
		LogFormat:   LogText,
	}
}

// fields are the keys of the YAML form. Each reads its value into the
// configuration, or says what would have been right.
var fields = map[string]func(*Config, *yaml.Node) error{
	"partitionBy": func(c *Config, n *yaml.Node) error {
		return oneOf(n, &c.PartitionBy, ScopePod, ScopeContainer)
	},
	"startDelays": func(c *Config, n *yaml.Node) error {
		if n.Kind != yaml.SequenceNode || len(n.Content) > maxStartDelays {
			return fmt.Errorf("%s is not right: write a list of at most %d durations, such as [1s, 10s]", shown(n), maxStartDelays)
		}
		c.StartDelays = make([]time.Duration, len(n.Content))
		for i, item := range n.Content {
			if err := duration(item, &c.StartDelays[i], 0); err != nil {
				return err
			}
		}
		return nil
	},
	"interval": func(c *Config, n *yaml.Node) error {
		return duration(n, &c.Interval, minInterval)
	},
	"wrapper": func(c *Config, n *yaml.Node) error {
		return path(n, &c.Wrapper, "the selective-ksm binary, or \"\" for the one that runs")
	},
	"logFile": func(c *Config, n *yaml.Node) error {
		return path(n, &c.LogFile, "a file, or \"\" for standard error")
	},
	"logLevel": func(c *Config, n *yaml.Node) error {
		return oneOf(n, &c.LogLevel, logLevels...)
	},
	"logFormat": func(c *Config, n *yaml.Node) error {
		return oneOf(n, &c.LogFormat, LogText, LogJSON)
	},
}

// Load reads the configuration in a YAML file. The error is one line that starts
// with the path.
func Load(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("configuration: %w", err)
	}
	c, err := Parse(data)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Parse reads a configuration from YAML. Keys that are not given keep their
// [Default]. A key that is unknown or given twice, and a value that is of the
// wrong type or out of range, are errors of one line that names the line, the
// key, the value and what to write instead.
func Parse(data []byte) (Config, error) {
	c := Default()
	var doc yaml.Node
	d := yaml.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(&doc); errors.Is(err, io.EOF) {
		return c, nil
	} else if err != nil {
		return Config{}, fmt.Errorf("not YAML: %s", strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return Config{}, errors.New("more than one YAML document: keep one")
	}

	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return c, nil
	}
	if root.Kind != yaml.MappingNode {
		return Config{}, fmt.Errorf("line %d: %s is not a mapping: write lines of the form key: value", root.Line, shown(root))
	}
	seen := map[string]bool{}
	for pair := range slices.Chunk(root.Content, 2) {
		key, value := pair[0], pair[1]
		read, known := fields[key.Value]
		switch {
		case !known:
			return Config{}, fmt.Errorf("line %d: %s: unknown key: known are %s", key.Line, key.Value, strings.Join(fieldNames(), ", "))
		case seen[key.Value]:
			return Config{}, fmt.Errorf("line %d: %s: given twice: keep one", key.Line, key.Value)
		}
		seen[key.Value] = true
		if value.Kind == yaml.AliasNode {
			value = value.Alias
		}
		if err := read(&c, value); err != nil {
			return Config{}, fmt.Errorf("line %d: %s: %w", key.Line, key.Value, err)
		}
	}
	return c, nil
}

func fieldNames() []string {
	names := make([]string, 0, len(fields))
	for name := range fields {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func oneOf[T ~string](n *yaml.Node, into *T, allowed ...T) error {
	if n.Kind == yaml.ScalarNode && slices.Contains(allowed, T(n.Value)) {
		*into = T(n.Value)
		return nil
	}
	names := make([]string, len(allowed))
	for i, a := range allowed {
		names[i] = string(a)
	}
	return fmt.Errorf("%s is not known: write %s", shown(n), strings.Join(names, " or "))
}

func duration(n *yaml.Node, into *time.Duration, least time.Duration) error {
	d, err := time.ParseDuration(n.Value)
	if n.Kind != yaml.ScalarNode || err != nil {
		return fmt.Errorf("%s is not a duration: write a number with a unit, such as 90s or 10m", shown(n))
	}
	if d < least {
		return fmt.Errorf("%s is too short: write %s or more", shown(n), least)
	}
	*into = d
	return nil
}

func path(n *yaml.Node, into *string, of string) error {
	switch {
	case n.Kind == yaml.ScalarNode && filepath.IsAbs(n.Value):
		*into = filepath.Clean(n.Value)
	case n.Kind == yaml.ScalarNode && n.Value == "" && n.Tag != "!!null":
		*into = ""
	default:
		return fmt.Errorf("%s is not an absolute path: write the path of %s", shown(n), of)
	}
	return nil
}

// shown is a value as an error names it.
func shown(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	if n.Tag == "!!null" {
		return "an empty value"
	}
	return fmt.Sprintf("%q", n.Value)
}
