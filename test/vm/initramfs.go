package vm

import (
	"bufio"
	"debug/elf"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/selective-ksm/selective-ksm/test/vm/internal/guest"
)

// writeInitramfs writes an archive with the guest's init and its task.
func writeInitramfs(w io.Writer, initFile string, task guest.Task) error {
	if err := checkStatic(initFile); err != nil {
		return err
	}
	init, err := os.ReadFile(initFile)
	if err != nil {
		return err
	}
	taskJSON, err := json.Marshal(task)
	if err != nil {
		return err
	}
	buf := bufio.NewWriter(w)
	writeEntry(buf, "init", 0o100755, init)
	writeEntry(buf, guest.TaskFile[1:], 0o100644, taskJSON)
	writeEntry(buf, "TRAILER!!!", 0, nil)
	return buf.Flush() // it keeps the first error
}

// writeEntry writes a file in the "newc" format of cpio, which the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst specifies.
func writeEntry(w *bufio.Writer, name string, mode int, content []byte) {
	const headerSize = 110
	fmt.Fprint(w, "070701")
	for _, field := range []int{
		0, // inode: only hard links need one
		mode,
		0, 0, // owner
		1, // links
		0, // modification time
		len(content),
		0, 0, // device of the file
		0, 0, // device that the file is
		len(name) + 1,
		0, // checksum: none in this format
	} {
		fmt.Fprintf(w, "%08X", field)
	}
	fmt.Fprintf(w, "%s\x00", name)
	pad(w, headerSize+len(name)+1)
	w.Write(content)
	pad(w, len(content))
}

// pad fills up to a multiple of 4 bytes after n.
func pad(w *bufio.Writer, n int) {
	w.Write(make([]byte, -n&3))
}

// checkStatic fails if a program needs a dynamic linker: before the root is
// mounted there is none.
func checkStatic(program string) error {
	f, err := elf.Open(program)
	if err != nil {
		return fmt.Errorf("init %s: %w", program, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("init %s is not static; build it with CGO_ENABLED=0", program)
		}
	}
	return nil
}
