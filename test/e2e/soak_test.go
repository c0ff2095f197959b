package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/regbridge/regbridge/test/harness"
)

// TestSoakEdits edits an entry a hundred times, every way there is, and looks for what is left behind.
func TestSoakEdits(t *testing.T) {
	soak(t)
	w := newWorld(t)
	w.consul = harness.StartConsul(t, harness.ConsulOptions{})
	w.bridge = harness.StartRegbridge(t, harness.RegbridgeOptions{Args: []string{"--pprof"}})
	for i := range 20 {
		w.consul.Register(instance(fmt.Sprintf("web-%d", i), &harness.Upstream{Name: fmt.Sprintf("web-%d", i), IP: "127.0.0.2", Port: w.port}))
	}
	edit := func(i int) {
		settings := []string{
			"refreshInterval: %ds", "consulServiceTag: '', refreshInterval: %ds", "protocol: tcp, refreshInterval: %ds",
			"consulPassingOnly: false, refreshInterval: %ds",
		}[i%4]
		w.bridge.WriteConfig("consul.yaml", mcpBridge("consul", w.consulEntry("c", fmt.Sprintf(settings, 10+i))))
		harness.Eventually(t, patience, func() error { return w.synced(10 + i) })
	}
	for i := range 8 { // warm up
		edit(i)
	}
	goroutines, files := w.leftovers(t)
	for i := range 100 {
		edit(8 + i)
	}
	harness.Eventually(t, time.Minute, func() error {
		g, f := w.leftovers(t)
		if g > goroutines+10 || f > files+10 {
			return fmt.Errorf("after 100 edits: %d goroutines (%d before), %d open files (%d before)", g, goroutines, f, files)
		}
		return nil
	})
}

// synced returns nil once the entry is read completely with that refresh interval, in seconds.
func (w *world) synced(interval int) error {
	page, err := w.bridge.Get("/debug/registries")
	if err != nil {
		return err
	}
	var all []struct {
		State, RefreshInterval string
		Published              int
	}
	if err := json.Unmarshal([]byte(page), &all); err != nil {
		return err
	}
	want := (time.Duration(interval) * time.Second).String()
	if len(all) != 1 || all[0].State != "synced" || all[0].RefreshInterval != want || all[0].Published < 20 {
		return fmt.Errorf("%+v is not synced with interval %s", all, want)
	}
	return nil
}

// leftovers counts regbridge's goroutines and open files.
func (w *world) leftovers(t *testing.T) (goroutines, files int) {
	t.Helper()
	page, err := w.bridge.Get("/debug/pprof/goroutine?debug=1")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`goroutine profile: total (\d+)`).FindStringSubmatch(page)
	if m == nil {
		t.Fatal(errors.New("no goroutine profile"))
	}
	goroutines, _ = strconv.Atoi(m[1])
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.bridge.PID()))
	if err != nil {
		t.Fatal(err)
	}
	return goroutines, len(open)
}
