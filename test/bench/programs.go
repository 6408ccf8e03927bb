package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selective-ksm/selective-ksm/engine/estimate"
	"github.com/selective-ksm/selective-ksm/engine/optin"
	"github.com/selective-ksm/selective-ksm/test/bench/result"
)

// A program is one that people run many of, from Debian's packages. Of each run containers
// in two namespaces, of two in each pod.
type program struct {
	name string
	// command starts it, with files of its own in a directory.
	command func(dir string) (*exec.Cmd, error)
	// ready waits until it has all that it is going to have, and puts that in.
	ready func(ctx context.Context, dir string) error
}

const nginxConfig = `daemon off;
user root;
worker_processes 2;
pid %[1]s/pid;
error_log %[1]s/error.log;
events {}
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	server { listen unix:%[1]s/socket; root /usr/share/nginx/html; }
}
`

// pythonService imports what a small web service does, and answers requests.
const pythonService = `
import asyncio, decimal, email, http.server, json, logging, socketserver, sqlite3, ssl, sys, urllib.request, xml.dom.minidom
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
socketserver.UnixStreamServer(sys.argv[1], Handler).serve_forever()
`

// keys and keySize are what Redis holds, and bytes of each.
const keys, keySize = 20_000, 200

var programs = []program{
	{
		name: "nginx",
		command: func(dir string) (*exec.Cmd, error) {
			path := filepath.Join(dir, "nginx.conf")
			return exec.Command("/usr/sbin/nginx", "-c", path), os.WriteFile(path, fmt.Appendf(nil, nginxConfig, dir), 0o644)
		},
		ready: func(ctx context.Context, dir string) error {
			return exchange(ctx, dir, "GET / HTTP/1.0\r\n\r\n", "HTTP/1.1 200")
		},
	},
	{
		name: "redis",
		command: func(dir string) (*exec.Cmd, error) {
			return exec.Command("/usr/bin/redis-server", "--port", "0", "--unixsocket", filepath.Join(dir, "socket"),
				"--save", "", "--dir", dir, "--enable-debug-command", "yes"), nil
		},
		ready: func(ctx context.Context, dir string) error {
			return exchange(ctx, dir, fmt.Sprintf("DEBUG POPULATE %d key %d\r\n", keys, keySize), "+OK")
		},
	},
	{
		name: "python",
		command: func(dir string) (*exec.Cmd, error) {
			return exec.Command("/usr/bin/python3", "-c", pythonService, filepath.Join(dir, "socket")), nil
		},
		ready: func(ctx context.Context, dir string) error {
			return exchange(ctx, dir, "GET / HTTP/1.0\r\n\r\n", "HTTP/1.0 200")
		},
	},
}

// exchange says something to the socket in a directory as soon as there is one, and waits
// for an answer that begins as it must.
func exchange(ctx context.Context, dir, say, want string) error {
	var (
		conn net.Conn
		err  error
		dial net.Dialer
	)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if conn, err = dial.DialContext(ctx, "unix", filepath.Join(dir, "socket")); err == nil {
			break
		}
		if wait(ctx, 20*time.Millisecond) != nil {
			return err
		}
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := conn.Write([]byte(say)); err != nil {
		return err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if !strings.HasPrefix(line, want) {
		return fmt.Errorf("%q was answered with %q: %v", say, line, err)
	}
	return nil
}

// saved measures what is saved of containers with real programs, by policy, and what is
// estimated beforehand. A kernel without partitions merges all with each other.
func (g *guest) saved(ctx context.Context) error {
	if err := g.unpack(ctx); err != nil {
		return err
	}
	for _, p := range g.programs {
		if err := g.savedOf(ctx, p); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// unpack puts those of Debian's packages in the VM's files, which end with it, that the
// machine has not installed.
func (g *guest) unpack(ctx context.Context) error {
	debs, err := filepath.Glob(filepath.Join(filepath.Dir(g.bin), "debs", "*.deb"))
	if err != nil {
		return err
	}
	for _, deb := range debs {
		// /lib and its like may be symbolic links.
		out, err := exec.CommandContext(ctx, "sh", "-c", `dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink -C /`, "sh", deb).CombinedOutput()
		if err != nil {
			return fmt.Errorf("unpack %s: %w: %s", deb, err, out)
		}
	}
	return nil
}

func (g *guest) savedOf(ctx context.Context, p program) error {
	fill := func(dir string, f *fleet) error {
		for _, namespace := range []string{"shop", "bank"} {
			for pod := range g.replicas {
				if err := g.runPod(ctx, f, p, dir, namespace, fmt.Sprint(p.name, "-", pod)); err != nil {
					return err
				}
			}
		}
		return nil
	}
	tell := func(variant string, bytes uint64) error {
		return g.sample(result.Sample{Figure: "programs", Case: p.name, Variant: variant, Value: float64(bytes) / (1 << 20)})
	}
	return withFleet(fill, func(dir string, f *fleet, r *nri) error {
		if !g.selective {
			saved, err := savedByKsmd(ctx)
			return errors.Join(err, tell("the whole node, by ksmd", saved))
		}
		estimated, err := g.foretold(ctx, r, dir)
		if err != nil {
			return err
		}
		// Some programs have started others meanwhile.
		all, err := f.anonymous()
		if err := errors.Join(err, tell(anonymous, all)); err != nil {
			return err
		}
		for _, policy := range []string{"container", "pod", "namespace"} {
			saved, now, err := g.savedBy(ctx, f, r, dir, policy)
			if err != nil {
				return fmt.Errorf("partitionBy: %s: %w", policy, err)
			}
			by := "by " + policy
			if err := errors.Join(tell(by, saved), tell(by+", freed", all-min(all, now)), tell(by+", estimated", estimated[policy])); err != nil {
				return err
			}
		}
		return tell("the whole node, estimated", estimated["node"])
	})
}

// runPod starts a pod of two containers of a program.
func (g *guest) runPod(ctx context.Context, f *fleet, p program, dir, namespace, name string) error {
	pod, err := f.pod(name, namespace)
	if err != nil {
		return err
	}
	for i := range 2 {
		ctr, err := f.container(pod, fmt.Sprint(p.name, "-", i))
		if err != nil {
			return err
		}
		own := filepath.Join(dir, namespace, name, ctr.Name)
		if err := os.MkdirAll(own, 0o755); err != nil {
			return err
		}
		cmd, err := p.command(own)
		if err != nil {
			return err
		}
		if !g.selective {
			// Nobody makes it mergeable from outside.
			cmd = exec.Command(filepath.Join(g.bin, product), optin.Wrap("", cmd.Args)[1:]...)
		}
		// Its first process is that of a pid namespace: all end with it.
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
		log, err := os.Create(filepath.Join(own, "log"))
		if err != nil {
			return err
		}
		defer log.Close()
		cmd.Stdout, cmd.Stderr = log, log
		if err := f.start(ctr, cmd); err != nil {
			return err
		}
		if err := p.ready(ctx, own); err != nil {
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("%w\n%s", err, text)
		}
	}
	return nil
}

// anonymous is the memory of the containers' processes that merging is about, in bytes.
// What several map counts once.
func (f *fleet) anonymous() (sum uint64, err error) {
	for _, ctr := range f.containers {
		pids, err := os.ReadFile(filepath.Join(root, ctr.Linux.CgroupsPath, "cgroup.procs"))
		if err != nil {
			return 0, err
		}
		for _, pid := range strings.Fields(string(pids)) {
			rollup, err := os.ReadFile(filepath.Join("/proc", pid, "smaps_rollup"))
			if err != nil {
				return 0, err
			}
			for line := range strings.Lines(string(rollup)) {
				if value, ok := strings.CutPrefix(line, "Pss_Anon:"); ok {
					kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
					if err != nil {
						return 0, err
					}
					sum += kib << 10
				}
			}
		}
	}
	return sum, nil
}

// foretold is what selective-ksm estimate says that each policy would save, in bytes. It
// asks a plugin, which merges nothing, for the containers' namespaces.
func (g *guest) foretold(ctx context.Context, r *nri, dir string) (by map[string]uint64, err error) {
	p, err := startAgent(filepath.Join(g.bin, product), dir, logged+"startDelays: [1h]\ninterval: 24h\npressure: off\n")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	if _, err := r.connected(ctx, p); err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, filepath.Join(g.bin, product), "estimate", "-json", "-interval", "1s").Output()
	if err != nil {
		return nil, fmt.Errorf("estimate: %w", err)
	}
	var report estimate.Report
	if err := json.Unmarshal(out, &report); err != nil {
		return nil, fmt.Errorf("estimate: %w", err)
	}
	by = map[string]uint64{}
	for _, policy := range report.Policies {
		by[policy.Policy] = policy.Saved
	}
	return by, nil
}

// savedBy is what the kernel says is saved when all containers have been merged by a policy,
// and the anonymous memory that they have then, in bytes. The kernel counts a page that
// several have by fork as often, and does not count the zeroes that go with a huge page
// that is split.
func (g *guest) savedBy(ctx context.Context, f *fleet, r *nri, dir, policy string) (saved, now uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	config := logged + unbounded + "startDelays: [0s]\ninterval: 24h\npressure: off\npartitionBy: " + policy + "\n"
	p, err := startAgent(filepath.Join(g.bin, product), dir, config)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	if _, err := r.connected(ctx, p); err != nil {
		return 0, 0, err
	}
	if err := p.waitMerged(ctx, len(f.containers)); err != nil {
		return 0, 0, err
	}
	pages, err := allSharing()
	if err != nil {
		return 0, 0, err
	}
	now, err = f.anonymous()
	return uint64(pages * os.Getpagesize()), now, err
}

// savedByKsmd is what is saved when all that is mergeable has been merged, in bytes.
func savedByKsmd(ctx context.Context) (saved uint64, err error) {
	d, err := findKsmd()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.unmerge()) }()
	before, err := scans()
	if err != nil {
		return 0, err
	}
	if err := d.start(modes[0]); err != nil {
		return 0, err
	}
	const enough = 4 // scans: it merges what did not change between two
	if reached, err := reach(ctx, scans, before+enough, patience); err != nil || !reached {
		return 0, errors.Join(errors.New("ksmd has not scanned all"), err)
	}
	pages, err := sharing()
	return uint64(pages * os.Getpagesize()), err
}
