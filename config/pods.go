package config

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Pods are rules of which pods are merged. A pod has to pass all of them.
type Pods struct {
	// Namespaces goes by the pod's Kubernetes namespace.
	Namespaces Rule
	// RuntimeHandlers goes by that of the pod's runtime class, the empty name being the
	// runtime's default.
	RuntimeHandlers Rule
	// Labels goes by the pod's labels. Its patterns are a label's key, "=", and a
	// pattern for the value.
	Labels Rule
	// HostPID merges containers that see the processes of the machine.
	HostPID bool
	// Privileged merges privileged containers.
	Privileged bool
	// OnlyAnnotated merges only containers that ask for it by [AnnotationMerge].
	OnlyAnnotated bool
}

// Rule chooses by patterns as those of [path.Match].
type Rule struct {
	// Include are the patterns of which one must match. If there are none, all are
	// taken.
	Include []string
	// Exclude are those of which none may match.
	Exclude []string
}

// leaveOut says why a pod is not merged.
func (p Pods) leaveOut(s Sandbox) (reason string) {
	for _, one := range []struct {
		field, what string
		rule        Rule
		match       func(pattern string) bool
	}{
		{"namespaces", fmt.Sprintf("its namespace %q", s.Namespace), p.Namespaces,
			func(pattern string) bool { return match(pattern, s.Namespace) }},
		{"runtimeHandlers", fmt.Sprintf("its runtime handler %q", s.RuntimeHandler), p.RuntimeHandlers,
			func(pattern string) bool { return match(pattern, s.RuntimeHandler) }},
		{"labels", "a label of its pod", p.Labels, func(pattern string) bool {
			key, pattern, _ := strings.Cut(pattern, "=")
			value, has := s.Labels[key]
			return has && match(pattern, value)
		}},
	} {
		switch {
		case slices.ContainsFunc(one.rule.Exclude, one.match):
			return fmt.Sprintf("pods.%s.exclude of the configuration has %s", one.field, one.what)
		case len(one.rule.Include) > 0 && !slices.ContainsFunc(one.rule.Include, one.match):
			return fmt.Sprintf("pods.%s.include of the configuration has not %s", one.field, one.what)
		}
	}
	return ""
}

// match reports whether a name matches a pattern that was checked when it was read.
func match(pattern, name string) bool {
	ok, err := path.Match(pattern, name)
	return ok && err == nil
}

func matchAny(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(pattern string) bool { return match(pattern, name) })
}

var podFields = map[string]func(*Pods, *yaml.Node) error{
	"namespaces": func(p *Pods, n *yaml.Node) error {
		return mapping(n, &p.Namespaces, ruleFields(checkPattern))
	},
	"runtimeHandlers": func(p *Pods, n *yaml.Node) error {
		return mapping(n, &p.RuntimeHandlers, ruleFields(checkPattern))
	},
	"labels": func(p *Pods, n *yaml.Node) error {
		return mapping(n, &p.Labels, ruleFields(func(n *yaml.Node) error {
			key, pattern, ok := strings.Cut(n.Value, "=")
			if !ok || key == "" || !validPattern(pattern) {
				return fmt.Errorf("%s is not right: write a label's key and a pattern for its value, such as app=web-*", shown(n))
			}
			return nil
		}))
	},
	"hostPID":       func(p *Pods, n *yaml.Node) error { return boolean(n, &p.HostPID) },
	"privileged":    func(p *Pods, n *yaml.Node) error { return boolean(n, &p.Privileged) },
	"onlyAnnotated": func(p *Pods, n *yaml.Node) error { return boolean(n, &p.OnlyAnnotated) },
}

func ruleFields(check func(*yaml.Node) error) map[string]func(*Rule, *yaml.Node) error {
	return map[string]func(*Rule, *yaml.Node) error{
		"include": func(r *Rule, n *yaml.Node) error { return patterns(n, &r.Include, check) },
		"exclude": func(r *Rule, n *yaml.Node) error { return patterns(n, &r.Exclude, check) },
	}
}

// patterns reads a list of patterns.
func patterns(n *yaml.Node, into *[]string, check func(*yaml.Node) error) error {
	if n.Kind != yaml.SequenceNode {
		return fmt.Errorf("%s is not a list: write one of patterns, such as [shop, team-*]", shown(n))
	}
	*into = nil
	for _, item := range n.Content {
		if item.Kind == yaml.AliasNode {
			item = item.Alias
		}
		if err := check(item); err != nil {
			return err
		}
		*into = append(*into, item.Value)
	}
	return nil
}

func checkPattern(n *yaml.Node) error {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || !validPattern(n.Value) {
		return fmt.Errorf("%s is not a pattern: write a name, in which * is any text and ? any character", shown(n))
	}
	return nil
}

func validPattern(pattern string) bool {
	_, err := path.Match(pattern, "")
	return err == nil
}

// sharedGroups reads the groups that reach beyond one namespace.
func sharedGroups(c *Config, n *yaml.Node) error {
	if n.Kind != yaml.MappingNode {
		return fmt.Errorf("%s is not a mapping: write the name of a group and a list of namespaces, such as web: [shop, team-*]", shown(n))
	}
	c.SharedGroups = map[string][]string{}
	fields := map[string]func(*Config, *yaml.Node) error{}
	for pair := range slices.Chunk(n.Content, 2) {
		name := pair[0].Value
		if !groupName.MatchString(name) {
			return fmt.Errorf("%s is not the name of a group: write up to 63 letters, digits, '.', '_' and '-'", shown(pair[0]))
		}
		fields[name] = func(c *Config, n *yaml.Node) error {
			var namespaces []string
			err := patterns(n, &namespaces, checkPattern)
			c.SharedGroups[name] = namespaces
			return err
		}
	}
	return mapping(n, c, fields)
}
