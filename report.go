package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/selective-ksm/selective-ksm/engine/control/page"
)

// runReport writes one HTML page of what other commands have told.
func runReport(args []string) error {
	var (
		data page.Data
		into string
	)
	flags := newFlags("report")
	from := func(name string, read func(data []byte) error) {
		flags.Func(name, "", func(path string) error {
			content, err := os.ReadFile(path)
			if err == nil {
				err = read(content)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			return nil
		})
	}
	from("status", func(content []byte) error {
		some, err := page.ReadStatus(content)
		data.Statuses = append(data.Statuses, some...)
		return err
	})
	from("estimate", func(content []byte) (err error) {
		data.Estimate, err = page.ReadEstimate(content)
		return err
	})
	from("bench", func(content []byte) (err error) {
		data.Bench, err = page.ReadBench(content)
		return err
	})
	flags.StringVar(&into, "o", "", "")
	if err := parse(flags, args); err != nil {
		return err
	}
	if len(data.Statuses) == 0 && data.Estimate == nil && data.Bench == nil {
		return fmt.Errorf("report: nothing to show: name a file by -status, -estimate or -bench: %w", errUsage)
	}
	if into == "" {
		return page.Write(os.Stdout, data)
	}
	// Not for everybody: it tells what status does.
	file, err := os.OpenFile(into, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("report: -o: %w", err)
	}
	return errors.Join(page.Write(file, data), file.Close())
}
