package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/selective-ksm/selective-ksm/test/bench/result"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
)

// outputs has commands print what the README shows: on a real containerd, with pods of two
// containers that all hold the same, and one that is left out.
func (g *guest) outputs(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, nodeTimeout)
	defer cancel()
	if err := g.run(ctx, "demo", filepath.Join(g.bin, "demo"), "-build", filepath.Dir(g.bin)); err != nil {
		return err
	}
	return g.withNode(ctx, func(n *node.Node) error { return g.outputsOn(ctx, n) })
}

// outputsOn does so but for the demo, which has a containerd of its own.
func (g *guest) outputsOn(ctx context.Context, n *node.Node) (err error) {
	program := filepath.Join(g.bin, product)
	var containers []*node.Container
	defer func() {
		for _, c := range containers {
			err = errors.Join(err, c.Close())
		}
	}()
	var ids []string
	for _, name := range []string{"bank", "shop"} {
		pod, err := n.RunPod(ctx, name)
		if err != nil {
			return err
		}
		for _, name := range []string{"web", "worker"} {
			c, err := pod.Start(ctx, node.ContainerConfig{Name: name, MiB: g.size.shown, Seed: 1})
			if err != nil {
				return err
			}
			containers = append(containers, c)
			ids = append(ids, c.ID)
		}
	}
	if err := g.run(ctx, "estimate", program, "estimate"); err != nil {
		return err
	}
	quiet, err := n.RunPodWith(ctx, node.PodConfig{Name: "quiet", Annotations: map[string]string{"merge.selective-ksm.dev": "off"}})
	if err != nil {
		return err
	}
	config := n.Path("selective-ksm.yaml")
	if err := os.WriteFile(config, []byte("logFormat: json\n"+unbounded), 0o644); err != nil {
		return err
	}
	p, err := plugin.Start(ctx, program, config, n.NRISocket())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Stop()) }()
	c, err := quiet.Start(ctx, node.ContainerConfig{Name: "web", MiB: 1})
	if err != nil {
		return err
	}
	containers = append(containers, c)
	lines, err := p.Merged(ctx, time.Time{}, ids...)
	if err != nil {
		return err
	}
	if err := g.output("log", fold(lines[len(lines)-1].Text)); err != nil {
		return err
	}
	return g.run(ctx, "status", program, "status")
}

// run tells what a command prints.
func (g *guest) run(ctx context.Context, name, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", name, err, out)
	}
	return g.output(name, string(out))
}

// fold breaks a line of the log in JSON between its fields, so that each part has the width
// of a table if the fields allow that.
func fold(line string) string {
	var b strings.Builder
	width := 0
	for i, field := range strings.Split(line, `,"`) {
		if i > 0 {
			field = `"` + field
			b.WriteString(",")
			if width++; width+len(field) >= result.Width {
				b.WriteString("\n ")
				width = 1
			}
		}
		b.WriteString(field)
		width += len(field)
	}
	b.WriteString("\n")
	return b.String()
}
