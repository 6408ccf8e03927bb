// Command bench measures how long merging takes: a merge on request, where the
// kernel has Selective KSM, ksmd at its fastest, where it has not. It runs in
// a VM and prints what it measured as JSON. As "bench compare", it makes a
// table of that from both kernels, and fails if the first does not keep what
// the kernel series promises.
//
//	bench [-rounds N]
//	bench [-json FILE] compare FILE...
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func run() error {
	rounds := flag.Int("rounds", 5, "how often each is measured")
	out := flag.String("json", "", "write what compare makes of the measurements to `FILE` too")
	flag.Parse()
	if flag.Arg(0) == "compare" {
		return compare(os.Stdout, *out, flag.Args()[1:])
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	measured, err := measure(context.Background(), filepath.Join(filepath.Dir(self), "actor"), *rounds)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(measured)
}
