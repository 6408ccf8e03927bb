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
		"daemon": {
			yaml: "partitionBy: container\nstartDelays: [0s, 2m]\ninterval: 1h\nwrapper: /opt/sksm/bin/../selective-ksm\nlogFile: /var/log/sksm.log\noptIn: wrapper\nlogLevel: debug\nlogFormat: json\n",
			want: with(func(c *Config) {
				c.PartitionBy, c.StartDelays, c.Interval = ScopeContainer, []time.Duration{0, 2 * time.Minute}, time.Hour
				c.OptIn, c.Wrapper = OptInWrapper, "/opt/sksm/selective-ksm"
				c.LogFile, c.LogLevel, c.LogFormat = "/var/log/sksm.log", "debug", LogJSON
			}),
		},
		"defaults of paths": {yaml: "wrapper: \"\"\nlogFile: ''\n", want: Default()},
		"no start delays":   {yaml: "startDelays: []", want: with(func(c *Config) { c.StartDelays = []time.Duration{} })},
		"engine": {
			yaml: "interface: syscall\nsyscalls: [467, 468]\nmainlinePartition: first\nmaxInterval: 2h\nbudget: 7.5%\npartitionBudget: 2 %\n" +
				"budgetWindow: 30s\nworkers: 4\npressure: pod\nsecrets: true\nzeroPages: true\nincremental: softDirty\n",
			want: with(func(c *Config) {
				c.Interface, c.Syscalls, c.MainlinePartition = InterfaceSyscall, []uint16{467, 468}, First
				c.MaxInterval, c.Budget, c.PartitionBudget, c.BudgetWindow, c.Workers = 2*time.Hour, 0.075, 0.02, 30*time.Second, 4
				c.Pressure, c.Secrets, c.ZeroPages, c.Incremental = PressurePod, true, true, BySoftDirty
			}),
		},
		"policy": {
			yaml: "partitionBy: namespace\nsharedGroups:\n  web: [shop, team-*]\n  none: []\npods:\n  namespaces: {include: ['*'], exclude: []}\n" +
				"  runtimeHandlers:\n    exclude: [kata*]\n  labels: {include: ['app.kubernetes.io/name=web-?', tier=]}\n  hostPID: true\n  privileged: true\n  onlyAnnotated: true\n",
			want: with(func(c *Config) {
				c.PartitionBy, c.SharedGroups = ScopeNamespace, map[string][]string{"web": {"shop", "team-*"}, "none": nil}
				c.Pods = Pods{
					Namespaces: Rule{Include: []string{"*"}}, RuntimeHandlers: Rule{Exclude: []string{"kata*"}},
					Labels:  Rule{Include: []string{"app.kubernetes.io/name=web-?", "tier="}},
					HostPID: true, Privileged: true, OnlyAnnotated: true,
				}
			}),
		},
		"included, and kube-system out as before": {
			yaml: "pods: {namespaces: {include: [shop]}}",
			want: with(func(c *Config) { c.Pods.Namespaces.Include = []string{"shop"} }),
		},
		"alias": {
			yaml: "startDelays: [&d 5s]\ninterval: *d",
			want: with(func(c *Config) { c.StartDelays = []time.Duration{5 * time.Second}; c.Interval = 5 * time.Second }),
		},

		"unknown key": {
			yaml: "interval: 1m\npartitonBy: pod\n",
			err:  "line 2: partitonBy: unknown key: known are budget, budgetWindow, incremental, interface, interval, logFile, logFormat, logLevel, mainlinePartition, maxInterval, optIn, partitionBudget, partitionBy, pods, pressure, secrets, sharedGroups, startDelays, syscalls, workers, wrapper, zeroPages",
		},
		"key twice":            {yaml: "interval: 1m\ninterval: 2m\n", err: "line 2: interval: given twice: keep one"},
		"not a mapping":        {yaml: "- interval", err: "line 1: a list is not a mapping: write lines of the form key: value"},
		"not YAML":             {yaml: "interval: [1m\n", err: "not YAML: line 1: did not find expected ',' or ']'"},
		"two documents":        {yaml: "interval: 1m\n---\ninterval: 2m\n", err: "more than one YAML document: keep one"},
		"scope":                {yaml: "partitionBy: node", err: `line 1: partitionBy: "node" is not known: write container or pod or group or namespace`},
		"scope of no value":    {yaml: "partitionBy:", err: "line 1: partitionBy: an empty value is not known: write container or pod or group or namespace"},
		"scope of a list":      {yaml: "partitionBy: [pod]", err: "line 1: partitionBy: a list is not known: write container or pod or group or namespace"},
		"interval, no unit":    {yaml: "interval: 10", err: `line 1: interval: "10" is not a duration: write a number with a unit, such as 90s or 10m`},
		"interval, mapping":    {yaml: "interval: {a: 1}", err: "line 1: interval: a mapping is not a duration: write a number with a unit, such as 90s or 10m"},
		"interval too short":   {yaml: "interval: 0s", err: `line 1: interval: "0s" is too short: write 1s or more`},
		"delays of a scalar":   {yaml: "startDelays: 1s", err: `line 1: startDelays: "1s" is not right: write a list of at most 16 durations, such as [1s, 10s]`},
		"negative delay":       {yaml: "startDelays: [1s, -1s]", err: `line 1: startDelays: "-1s" is too short: write 0s or more`},
		"relative wrapper":     {yaml: "wrapper: bin/selective-ksm", err: `line 1: wrapper: "bin/selective-ksm" is not an absolute path: write the path of the selective-ksm binary, or "" for the one that runs`},
		"interface":            {yaml: "interface: ksmd", err: `line 1: interface: "ksmd" is not known: write auto or sysfs or syscall or mainline`},
		"one syscall":          {yaml: "syscalls: [467]", err: `line 1: syscalls: a list is not right: write the numbers of ksm_open and ksm_merge, such as [467, 468]`},
		"bad syscall":          {yaml: "syscalls: [467, -1]", err: `line 1: syscalls: a list is not right: write the numbers of ksm_open and ksm_merge, such as [467, 468]`},
		"no name":              {yaml: `mainlinePartition: ""`, err: `line 1: mainlinePartition: "" is not the name of a partition: write one of 1 to 31 bytes, or first`},
		"budget":               {yaml: "budget: 0.05", err: `line 1: budget: "0.05" is not a percentage: write a number with its sign, such as 5%`},
		"budget, range":        {yaml: "budget: 0%", err: `line 1: budget: "0%" is out of range: write 0.1% to 6400% of one CPU`},
		"budget, NaN":          {yaml: "budget: NaN%", err: `line 1: budget: "NaN%" is out of range: write 0.1% to 6400% of one CPU`},
		"workers":              {yaml: "workers: 0", err: `line 1: workers: "0" is not right: write a number from 1 to 64`},
		"secrets":              {yaml: "secrets: yes", err: `line 1: secrets: "yes" is not known: write true or false`},
		"opt-in":               {yaml: "optIn: never", err: `line 1: optIn: "never" is not known: write auto or wrapper or ambient`},
		"pods of a list":       {yaml: "pods: [shop]", err: "line 1: pods: a list is not a mapping: write lines of the form key: value"},
		"unknown rule":         {yaml: "pods:\n  hostPid: true\n", err: "line 2: pods.hostPid: unknown key: known are hostPID, labels, namespaces, onlyAnnotated, privileged, runtimeHandlers"},
		"rule twice":           {yaml: "pods:\n  hostPID: true\n  hostPID: false\n", err: "line 3: pods.hostPID: given twice: keep one"},
		"pattern":              {yaml: "pods:\n  namespaces:\n    exclude: [a, '[']\n", err: `line 3: pods.namespaces.exclude: "[" is not a pattern: write a name, in which * is any text and ? any character`},
		"pattern of no list":   {yaml: "pods: {namespaces: {include: shop}}", err: `line 1: pods.namespaces.include: "shop" is not a list: write one of patterns, such as [shop, team-*]`},
		"pattern of a mapping": {yaml: "pods: {runtimeHandlers: {include: [{a: b}]}}", err: `line 1: pods.runtimeHandlers.include: a mapping is not a pattern: write a name, in which * is any text and ? any character`},
		"label":                {yaml: "pods: {labels: {include: [web]}}", err: `line 1: pods.labels.include: "web" is not right: write a label's key and a pattern for its value, such as app=web-*`},
		"name of a group":      {yaml: "sharedGroups: {-web: [shop]}", err: `line 1: sharedGroups: "-web" is not the name of a group: write up to 63 letters, digits, '.', '_' and '-'`},
		"shared group twice":   {yaml: "sharedGroups:\n  web: [shop]\n  web: [bank]\n", err: "line 3: sharedGroups.web: given twice: keep one"},
		"shared groups, list":  {yaml: "sharedGroups: [web]", err: `line 1: sharedGroups: a list is not a mapping: write the name of a group and a list of namespaces, such as web: [shop, team-*]`},
		"namespaces, scalar":   {yaml: "sharedGroups: {web: shop}", err: `line 1: sharedGroups.web: "shop" is not a list: write one of patterns, such as [shop, team-*]`},
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
