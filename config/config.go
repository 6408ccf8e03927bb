// Package config is what an operator decides: the settings of the daemon, read
// strictly from YAML, and the policy that gives each container its partition.
// Everything in it is a pure function of its arguments.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Scope is how far a partition reaches: whose memory may be merged with whose.
type Scope string

const (
	// ScopeContainer gives each container a partition of its own.
	ScopeContainer Scope = "container"
	// ScopePod gives the containers of one pod sandbox a partition together.
	ScopePod Scope = "pod"
	// ScopeGroup gives those containers of a Kubernetes namespace a partition together
	// that name the same group, and others that of their pod.
	ScopeGroup Scope = "group"
	// ScopeNamespace gives the containers of a Kubernetes namespace a partition
	// together.
	ScopeNamespace Scope = "namespace"
)

// Interface is how the kernel is asked to merge.
type Interface string

// The interfaces are those of the packages of the same names in engine/kernel.
const (
	// InterfaceAuto is sysfs where the kernel has it, and otherwise mainline if
	// MainlinePartition is set.
	InterfaceAuto     Interface = "auto"
	InterfaceSysfs    Interface = "sysfs"
	InterfaceSyscall  Interface = "syscall"
	InterfaceMainline Interface = "mainline"
)

// First is what MainlinePartition is where the first partition is to be merged.
const First = "first"

// Pressure is whose scarcity of memory brings merges forward.
type Pressure string

const (
	// PressureOff is nobody's.
	PressureOff Pressure = "off"
	// PressureNode is the machine's.
	PressureNode Pressure = "node"
	// PressurePod is that of a pod's cgroup, on cgroup v2.
	PressurePod Pressure = "pod"
)

// Incremental is how a merge finds out what has changed since the last one.
type Incremental string

const (
	// ByFaults passes over processes without page faults whose size is the same.
	ByFaults Incremental = "faults"
	// BySoftDirty goes by the kernel's record of the pages that were written to.
	BySoftDirty Incremental = "softDirty"
)

// OptIn is how the memory of containers is made mergeable.
type OptIn string

const (
	// OptInAuto is from outside where the kernel does that, and otherwise by the
	// wrapper.
	OptInAuto OptIn = "auto"
	// OptInWrapper is by a program that is put before the container's own.
	OptInWrapper OptIn = "wrapper"
	// OptInAmbient is by whoever started the runtime, from which containers inherit it.
	OptInAmbient OptIn = "ambient"
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
	// PartitionBy is the scope of the partitions: the widest that a container can ask
	// for, but for shared groups.
	PartitionBy Scope
	// SharedGroups are the groups that reach beyond one namespace, by their names, each
	// with patterns of the namespaces whose containers may join it.
	SharedGroups map[string][]string
	// Pods are the rules of which pods are merged.
	Pods Pods
	// Interface is how the kernel is asked.
	Interface Interface
	// Syscalls are the numbers of ksm_open and ksm_merge. Empty means those that the
	// kernel names.
	Syscalls []uint16
	// MainlinePartition is the one partition that is merged on a kernel that has one
	// merge space for the whole machine, or [First]. Empty means none.
	MainlinePartition string
	// StartDelays are the times after a container's start at which its partition
	// is merged.
	StartDelays []time.Duration
	// Interval is the time from the end of one merge of a partition to its next.
	Interval time.Duration
	// MaxInterval is what the interval grows to while merges save little. Zero means
	// eight times the interval.
	MaxInterval time.Duration
	// Budget is the share of one CPU that merging may take, and PartitionBudget that
	// of one partition, within any time of length BudgetWindow. 0.05 is 5 %.
	Budget, PartitionBudget float64
	BudgetWindow            time.Duration
	// Workers is how many partitions are merged at a time.
	Workers int
	// Pressure brings merges forward.
	Pressure Pressure
	// Secrets merges memory that programs have marked as secret, by MADV_DONTDUMP or
	// MADV_WIPEONFORK.
	Secrets bool
	// ZeroPages merges zero pages that were never written.
	ZeroPages bool
	// Incremental is how a merge finds out what has changed.
	Incremental Incremental
	// OptIn is how the memory of containers is made mergeable.
	OptIn OptIn
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
	minWindow      = time.Second
	maxStartDelays = 16
	maxWorkers     = 64
	maxName        = 31 // bytes of a partition's name that the kernel reads
)

var logLevels = []string{"error", "warning", "info", "debug"}

// Default returns the configuration of a daemon that is given none.
func Default() Config {
	return Config{
		PartitionBy:     ScopePod,
		Pods:            Pods{Namespaces: Rule{Exclude: []string{"kube-system"}}},
		Interface:       InterfaceAuto,
		StartDelays:     []time.Duration{0, 10 * time.Second, time.Minute},
		Interval:        10 * time.Minute,
		Budget:          0.05,
		PartitionBudget: 0.05,
		BudgetWindow:    time.Minute,
		Workers:         2,
		Pressure:        PressureNode,
		Incremental:     ByFaults,
		OptIn:           OptInAuto,
		LogLevel:        "info",
		LogFormat:       LogText,
	}
}

// fields are the keys of the YAML form. Each reads its value into the
// configuration, or says what would have been right.
var fields = map[string]func(*Config, *yaml.Node) error{
	"partitionBy": func(c *Config, n *yaml.Node) error {
		return oneOf(n, &c.PartitionBy, widths...)
	},
	"sharedGroups": sharedGroups,
	"pods":         func(c *Config, n *yaml.Node) error { return mapping(n, &c.Pods, podFields) },
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
	"interface": func(c *Config, n *yaml.Node) error {
		return oneOf(n, &c.Interface, InterfaceAuto, InterfaceSysfs, InterfaceSyscall, InterfaceMainline)
	},
	"syscalls": func(c *Config, n *yaml.Node) error {
		wrong := fmt.Errorf("%s is not right: write the numbers of ksm_open and ksm_merge, such as [467, 468]", shown(n))
		if n.Kind != yaml.SequenceNode || len(n.Content) != 2 {
			return wrong
		}
		c.Syscalls = make([]uint16, 2)
		for i, item := range n.Content {
			number, err := strconv.ParseUint(item.Value, 10, 16)
			if err != nil || number == 0 {
				return wrong
			}
			c.Syscalls[i] = uint16(number)
		}
		return nil
	},
	"mainlinePartition": func(c *Config, n *yaml.Node) error {
		if n.Kind != yaml.ScalarNode || n.Value == "" || len(n.Value) > maxName {
			return fmt.Errorf("%s is not the name of a partition: write one of 1 to %d bytes, or %s", shown(n), maxName, First)
		}
		c.MainlinePartition = n.Value
		return nil
	},
	"maxInterval": func(c *Config, n *yaml.Node) error {
		return duration(n, &c.MaxInterval, minInterval)
	},
	"budget":          func(c *Config, n *yaml.Node) error { return percent(n, &c.Budget) },
	"partitionBudget": func(c *Config, n *yaml.Node) error { return percent(n, &c.PartitionBudget) },
	"budgetWindow": func(c *Config, n *yaml.Node) error {
		return duration(n, &c.BudgetWindow, minWindow)
	},
	"workers": func(c *Config, n *yaml.Node) error {
		number, err := strconv.Atoi(n.Value)
		if n.Kind != yaml.ScalarNode || err != nil || number < 1 || number > maxWorkers {
			return fmt.Errorf("%s is not right: write a number from 1 to %d", shown(n), maxWorkers)
		}
		c.Workers = number
		return nil
	},
	"pressure": func(c *Config, n *yaml.Node) error {
		return oneOf(n, &c.Pressure, PressureOff, PressureNode, PressurePod)
	},
	"secrets":   func(c *Config, n *yaml.Node) error { return boolean(n, &c.Secrets) },
	"zeroPages": func(c *Config, n *yaml.Node) error { return boolean(n, &c.ZeroPages) },
	"incremental": func(c *Config, n *yaml.Node) error {
		return oneOf(n, &c.Incremental, ByFaults, BySoftDirty)
	},
	"optIn": func(c *Config, n *yaml.Node) error {
		return oneOf(n, &c.OptIn, OptInAuto, OptInWrapper, OptInAmbient)
	},
	"wrapper": func(c *Config, n *yaml.Node) error {
		return absolutePath(n, &c.Wrapper, "the selective-ksm binary, or \"\" for the one that runs")
	},
	"logFile": func(c *Config, n *yaml.Node) error {
		return absolutePath(n, &c.LogFile, "a file, or \"\" for standard error")
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
	if err := mapping(root, &c, fields); errors.As(err, new(*keyError)) {
		return Config{}, err
	} else if err != nil {
		return Config{}, fmt.Errorf("line %d: %w", root.Line, err)
	}
	return c, nil
}

// keyError is what is wrong with the value of a key.
type keyError struct {
	line int
	key  string // with the keys that it is below of
	err  error
}

func (e *keyError) Error() string { return fmt.Sprintf("line %d: %s: %v", e.line, e.key, e.err) }
func (e *keyError) Unwrap() error { return e.err }

// mapping reads the keys of a mapping. Errors of one of them are a [*keyError].
func mapping[T any](n *yaml.Node, into *T, fields map[string]func(*T, *yaml.Node) error) error {
	if n.Kind != yaml.MappingNode {
		return fmt.Errorf("%s is not a mapping: write lines of the form key: value", shown(n))
	}
	seen := map[string]bool{}
	for pair := range slices.Chunk(n.Content, 2) {
		key, value := pair[0], pair[1]
		read, known := fields[key.Value]
		var err error
		switch {
		case !known:
			err = fmt.Errorf("unknown key: known are %s", strings.Join(slices.Sorted(maps.Keys(fields)), ", "))
		case seen[key.Value]:
			err = errors.New("given twice: keep one")
		case value.Kind == yaml.AliasNode:
			err = read(into, value.Alias)
		default:
			err = read(into, value)
		}
		seen[key.Value] = true
		if below := (*keyError)(nil); errors.As(err, &below) {
			return &keyError{below.line, key.Value + "." + below.key, below.err}
		} else if err != nil {
			return &keyError{key.Line, key.Value, err}
		}
	}
	return nil
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

func absolutePath(n *yaml.Node, into *string, of string) error {
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

// percent reads a share, of which 1 is all of a CPU.
func percent(n *yaml.Node, into *float64) error {
	number, ok := strings.CutSuffix(n.Value, "%")
	share, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if n.Kind != yaml.ScalarNode || !ok || err != nil {
		return fmt.Errorf("%s is not a percentage: write a number with its sign, such as 5%%", shown(n))
	}
	// Not a number is none of both.
	if !(share >= 0.1 && share <= 100*maxWorkers) {
		return fmt.Errorf("%s is out of range: write 0.1%% to %d%% of one CPU", shown(n), 100*maxWorkers)
	}
	*into = share / 100
	return nil
}

func boolean(n *yaml.Node, into *bool) error {
	if n.Kind != yaml.ScalarNode || n.Value != "true" && n.Value != "false" {
		return fmt.Errorf("%s is not known: write true or false", shown(n))
	}
	*into = n.Value == "true"
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
