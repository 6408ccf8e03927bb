package config

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	with := func(change func(*Config)) Config {
		c := Default()
		change(&c)
		return c
	}
	for name, tc := range map[string]struct {
		yaml string
		want Config
		err  string
	}{
		"empty":        {yaml: "", want: Default()},
		"comment only": {yaml: "# nothing\n", want: Default()},
		"all": {
			yaml: "partitionBy: container\nstartDelays: [0s, 2m]\ninterval: 1h\nwrapper: /opt/sksm/bin/../selective-ksm\nlogFile: /var/log/sksm.log\nlogLevel: debug\nlogFormat: json\n",
			want: Config{
				PartitionBy: ScopeContainer, StartDelays: []time.Duration{0, 2 * time.Minute}, Interval: time.Hour,
				Wrapper: "/opt/sksm/selective-ksm", LogFile: "/var/log/sksm.log", LogLevel: "debug", LogFormat: LogJSON,
			},
		},
		"defaults of paths": {yaml: "wrapper: \"\"\nlogFile: ''\n", want: Default()},
		"no start delays":   {yaml: "startDelays: []", want: with(func(c *Config) { c.StartDelays = []time.Duration{} })},
		"alias": {
			yaml: "startDelays: [&d 5s]\ninterval: *d",
			want: with(func(c *Config) { c.StartDelays = []time.Duration{5 * time.Second}; c.Interval = 5 * time.Second }),
		},

		"unknown key": {
			yaml: "interval: 1m\npartitonBy: pod\n",
			err:  "line 2: partitonBy: unknown key: known are interval, logFile, logFormat, logLevel, partitionBy, startDelays, wrapper",
		},
		"key twice":            {yaml: "interval: 1m\ninterval: 2m\n", err: "line 2: interval: given twice: keep one"},
		"not a mapping":        {yaml: "- interval", err: "line 1: a list is not a mapping: write lines of the form key: value"},
		"not YAML":             {yaml: "interval: [1m\n", err: "not YAML: line 1: did not find expected ',' or ']'"},
		"two documents":        {yaml: "interval: 1m\n---\ninterval: 2m\n", err: "more than one YAML document: keep one"},
		"scope":                {yaml: "partitionBy: node", err: `line 1: partitionBy: "node" is not known: write pod or container`},
		"scope of no value":    {yaml: "partitionBy:", err: "line 1: partitionBy: an empty value is not known: write pod or container"},
		"scope of a list":      {yaml: "partitionBy: [pod]", err: "line 1: partitionBy: a list is not known: write pod or container"},
		"interval, no unit":    {yaml: "interval: 10", err: `line 1: interval: "10" is not a duration: write a number with a unit, such as 90s or 10m`},
		"interval, mapping":    {yaml: "interval: {a: 1}", err: "line 1: interval: a mapping is not a duration: write a number with a unit, such as 90s or 10m"},
		"interval too short":   {yaml: "interval: 0s", err: `line 1: interval: "0s" is too short: write 1s or more`},
		"delays of a scalar":   {yaml: "startDelays: 1s", err: `line 1: startDelays: "1s" is not right: write a list of at most 16 durations, such as [1s, 10s]`},
		"negative delay":       {yaml: "startDelays: [1s, -1s]", err: `line 1: startDelays: "-1s" is too short: write 0s or more`},
		"relative wrapper":     {yaml: "wrapper: bin/selective-ksm", err: `line 1: wrapper: "bin/selective-ksm" is not an absolute path: write the path of the selective-ksm binary, or "" for the one that runs`},
		"log file of no value": {yaml: "logFile:", err: `line 1: logFile: an empty value is not an absolute path: write the path of a file, or "" for standard error`},
		"log level":            {yaml: "logLevel: loud", err: `line 1: logLevel: "loud" is not known: write error or warning or info or debug`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse([]byte(tc.yaml))
			if tc.err != "" {
				if err == nil || err.Error() != tc.err {
					t.Fatalf("error is\n\t%v\nwant\n\t%s", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got  %+v\nwant %+v", got, tc.want)
			}
		})
	}
}

func TestLoadNamesTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.yaml")
	if _, err := Load(path); err == nil || err.Error() != "configuration: open "+path+": no such file or directory" {
		t.Errorf("missing file: %v", err)
	}
	if err := os.WriteFile(path, []byte("interval: often"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := path + `: line 1: interval: "often" is not a duration: write a number with a unit, such as 90s or 10m`
	if _, err := Load(path); err == nil || err.Error() != want {
		t.Errorf("bad file: %v", err)
	}
}
