package e2e_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/selective-ksm/selective-ksm/engine"
	"github.com/selective-ksm/selective-ksm/engine/control"
	"github.com/selective-ksm/selective-ksm/test/e2e/border"
	"github.com/selective-ksm/selective-ksm/test/e2e/node"
	"github.com/selective-ksm/selective-ksm/test/e2e/partition"
	"github.com/selective-ksm/selective-ksm/test/e2e/plugin"
)

// The README's commands for operators.
const (
	readmeStatus  = "selective-ksm status"
	readmeExplain = "selective-ksm explain shop/web"
	readmeUnmerge = "selective-ksm unmerge"
	readmeMerge   = "selective-ksm merge"
	readmeDoctor  = "selective-ksm doctor"
)

var readmeOperations = []string{readmeStatus, readmeExplain, readmeUnmerge, readmeMerge, readmeDoctor}

// call runs a command of the README, with more arguments, and returns what it wrote.
func call(t *testing.T, command string, more ...string) string {
	t.Helper()
	cmd := exec.CommandContext(deadline(t), program, append(strings.Fields(command)[1:], more...)...)
	var failed bytes.Buffer
	cmd.Stderr = &failed
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s%s", command, more, err, out, failed.String())
	}
	return string(out)
}

// wantWords fails the test unless words are there, in whatever lines.
func wantWords(t *testing.T, out string, want ...string) {
	t.Helper()
	words := strings.Join(strings.Fields(out), " ")
	for _, w := range want {
		if !strings.Contains(words, w) {
			t.Errorf("no %q in\n%s", w, out)
		}
	}
}

// status is what the engine says of itself.
func status(t *testing.T) control.Report {
	t.Helper()
	var r control.Report
	if err := json.Unmarshal([]byte(call(t, readmeStatus, "-json")), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// of is what it says of one partition.
func of(t *testing.T, name string) engine.PartitionStatus {
	t.Helper()
	all := status(t).Partitions
	i := slices.IndexFunc(all, func(p engine.PartitionStatus) bool { return p.Name == name })
	if i < 0 {
		t.Fatalf("no %s in %+v", name, all)
	}
	return all[i]
}

// confined is a command that runs another as the example of a systemd unit says, as far as
// that can be had without systemd: with these capabilities, and where nothing else can be
// written to.
func confined(t *testing.T) []string {
	t.Helper()
	unit := read(t, "examples/systemd/selective-ksm.service")
	get := func(setting string) []string {
		m := regexp.MustCompile(`(?m)^` + setting + `=(.+)$`).FindStringSubmatch(unit)
		if m == nil {
			t.Fatalf("the unit has no %s", setting)
		}
		return strings.Fields(m[1])
	}
	script := ""
	for _, path := range append(get("ReadWritePaths"), "/run/"+get("RuntimeDirectory")[0]) {
		path = strings.TrimPrefix(path, "-")
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		script += "mount --bind " + path + " " + path + " && "
	}
	caps := "-all"
	for _, name := range get("CapabilityBoundingSet") {
		caps += ",+" + strings.ToLower(strings.TrimPrefix(name, "CAP_"))
	}
	script += `for m in /sys /run /tmp /; do ! mountpoint -q $m || mount -o remount,bind,ro $m || exit; done && exec "$@"`
	return []string{
		"unshare", "--mount", "sh", "-ec", script, "confined",
		"setpriv", "--no-new-privs", "--bounding-set", caps, "--",
	}
}

// notified is a service manager that reads what the plugin tells it.
func notified(t *testing.T) func() string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", strconv.FormatInt(time.Minute.Microseconds(), 10))
	return func() string {
		t.Helper()
		if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 100)
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatalf("the service manager is not told: %v", err)
		}
		return string(buf[:n])
	}
}

// What operators have: they see what is merged and why what is not, have it unmerged and
// merged again, read metrics, and can leave the machine as it was.
func TestOperations(t *testing.T) {
	n := sharedNode(t)
	told := notified(t)
	if out, err := exec.Command(program, "status").CombinedOutput(); err == nil || strings.Count(string(out), "\n") != 1 ||
		!strings.Contains(string(out), "no engine runs on this machine") {
		t.Errorf("without an engine: %v, %s", err, out)
	}
	args := append(confined(t), program, "plugin", "-config", configFile(t, often+"maxInterval: 1s\n"), "-socket", n.NRISocket(),
		"-metrics", metricsPort, "-remove-on-exit")
	p, err := plugin.StartArgs(deadline(t), args[0], args[1:]...)
	if err != nil {
		t.Fatal(err)
	}
	stopAfter(t, p)
	for tells := map[string]bool{}; !tells["READY=1"] || !tells["WATCHDOG=1"]; tells[told()] = true {
	}

	guard := border.Watch()
	shop := run(t, n, guard, "shop", web(1), worker(1))
	bank := run(t, n, guard, "bank", web(1), worker(1))
	quiet, err := n.RunPodWith(deadline(t), node.PodConfig{Name: "quiet", Annotations: map[string]string{"merge.selective-ksm.dev": "off"}})
	if err != nil {
		t.Fatal(err)
	}
	removeAfter(t, quiet)
	out, err := quiet.Start(deadline(t), web(1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	all := slices.Concat(shop.containers, bank.containers)
	merged(t, p, shop.ready(), shop.containers...)
	merged(t, p, bank.ready(), bank.containers...)
	inShop := partition.OfPod(shop.ID)

	table := call(t, readmeStatus)
	t.Log(table)
	wantWords(t, table, inShop, "default/shop", "5 containers in 2 partitions, 1 not merged",
		`default/quiet/web: merge.selective-ksm.dev is "off"`)
	for line := range strings.Lines(table) {
		if len(line) > 81 {
			t.Errorf("%d columns: %s", len(line)-1, line)
		}
	}
	least := uint64(dataMiB << 20 / os.Getpagesize() * least / 100)
	if s := of(t, inShop); s.Counters == nil || s.Counters.Sharing < least || s.Work.CPU == 0 || s.Work.Merges.Count == 0 || s.Last.IsZero() {
		t.Errorf("%s has %+v", inShop, s)
	}
	if outside := status(t).Outside; len(outside) != 1 || outside[0].ID != out.ID || outside[0].Cause != engine.CausePolicy {
		t.Errorf("left out are %+v", outside)
	}
	explained := call(t, readmeExplain)
	t.Log(explained)
	wantWords(t, explained, shop.containers[0].ID, inShop, "partitionBy of the configuration is pod", "merged with default/shop/worker", "last merge")
	wantWords(t, call(t, "selective-ksm explain "+out.ID[:13]), "default/quiet/web", "partition none", `merge.selective-ksm.dev is "off" (policy)`)
	healthy := call(t, readmeDoctor, "-socket", n.NRISocket())
	t.Log(healthy)
	wantWords(t, healthy, "running engine")
	watched(t)

	body := scrape(t, metricsPort)
	for metric, least := range map[string]uint64{
		`selective_ksm_partition_saved_bytes{partition="` + inShop + `"}`:                  least * uint64(os.Getpagesize()),
		`selective_ksm_partition_containers{partition="` + inShop + `"}`:                   2,
		`selective_ksm_containers_skipped{reason="policy"}`:                                1,
		`selective_ksm_merge_duration_seconds_count`:                                       2,
		`selective_ksm_partition_last_merge_timestamp_seconds{partition="` + inShop + `"}`: uint64(shop.ready().Unix()),
	} {
		if got, err := value(body, metric); err != nil || got < float64(least) {
			t.Errorf("%s is %v, %v, want at least %d", metric, got, err, least)
		}
	}

	// All that they are told makes a page, that is for them alone.
	dir := t.TempDir()
	onPage := []string{"report", "-bench", "../bench/testdata/results.json", "-o", filepath.Join(dir, "page.html")}
	for what, args := range map[string]string{"status": "", "estimate": " -interval 0"} {
		path := filepath.Join(dir, what+".json")
		if err := os.WriteFile(path, []byte(call(t, "selective-ksm "+what+" -json"+args)), 0o600); err != nil {
			t.Fatal(err)
		}
		onPage = append(onPage, "-"+what, path)
	}
	if out, err := exec.CommandContext(deadline(t), program, onPage...).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("report: %v\n%s", err, out)
	}
	html, err := os.ReadFile(filepath.Join(dir, "page.html"))
	if err != nil {
		t.Fatal(err)
	}
	wantWords(t, string(html), "default/shop/", "namespace", "Time to merge")
	if info, err := os.Stat(filepath.Join(dir, "page.html")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the page is %v, %v", info.Mode(), err)
	}

	// One that is unmerged stays so while others are merged, and is merged when asked for.
	call(t, readmeUnmerge, inShop)
	waitFor(t, "it to be unmerged", func() bool { return of(t, inShop).Hold == engine.HoldUnmerged })
	merges := of(t, inShop).Work.Merges.Count
	for range 2 {
		merged(t, p, time.Now(), bank.containers...)
	}
	if together, _ := common(t, shop.containers[0], shop.containers[1]); together != 0 {
		t.Errorf("%d pages are shared after unmerge", together)
	}
	if s := of(t, inShop); s.Work.Merges.Count != merges || s.Containers[0].Cause != engine.CauseHeld {
		t.Errorf("while it is held %+v", s)
	}
	wantMerged(t, bank.containers[0], bank.containers[1])
	asked := time.Now()
	call(t, readmeMerge, inShop)
	merged(t, p, asked, shop.containers...)
	wantMerged(t, shop.containers[0], shop.containers[1])

	// The end leaves nothing merged.
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if got := told(); got != "STOPPING=1" {
		for got == "WATCHDOG=1" {
			got = told()
		}
		if got != "STOPPING=1" {
			t.Errorf("at the end the service manager was told %q", got)
		}
	}
	noPartitions(t)
	for _, pod := range []tenant{shop, bank} {
		if together, _ := common(t, pod.containers[0], pod.containers[1]); together != 0 {
			t.Errorf("%s: %d pages are shared at the end", pod.Name, together)
		}
	}
	unchanged(t, append(all, out)...)
	stopGuard(t, guard)
}

// watched fails the test unless status -watch goes on until it is interrupted, and ends
// well then.
func watched(t *testing.T) {
	t.Helper()
	cmd := exec.CommandContext(deadline(t), program, "status", "-watch=100ms")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for tables := 0; tables < 3 && lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "PARTITION") {
			tables++
		}
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() {
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("watching ends with %v", err)
	}
}

// scrape asks for the metrics as Prometheus does.
func scrape(t *testing.T, port string) string {
	t.Helper()
	q, err := http.NewRequestWithContext(deadline(t), http.MethodGet, "http://127.0.0.1"+port+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v: %s", r.Status, err, body)
	}
	return string(body)
}

// value is that of one metric.
func value(body, metric string) (float64, error) {
	_, rest, _ := strings.Cut("\n"+body, "\n"+metric+" ")
	text, _, _ := strings.Cut(rest, "\n")
	return strconv.ParseFloat(text, 64)
}
