package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"sigs.k8s.io/yaml"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/bridge/source"
	"github.com/regbridge/regbridge/mcp/xds"
	"github.com/regbridge/regbridge/registry"
)

// discoverFlags are the flags of discover.
type discoverFlags struct {
	timeout time.Duration
	output  string
	verbose bool
	input   inputFlags
	mesh    meshFlags
}

func newDiscover() *cobra.Command {
	var f discoverFlags
	cmd := &cobra.Command{
		Use:   "discover FILE [flags]",
		Short: "Read the registries once and show what would be published",
		Long: `discover connects to the registries that a file (or the files in a folder) names, reads each of them once, and prints what
would be published, and what would be left out and why. It serves nothing and keeps nothing.

Registries that could not be read within --timeout are named, and the exit status is 1 then, as it is for an entry that
cannot be used. One that fails twice, and with each of its servers, is not waited for longer than for the others.`,
		Example: `  regbridge discover bridge.yaml
  regbridge discover bridge.yaml --secrets-dir ./secrets --timeout 60s
  regbridge discover bridge.yaml -o json | jq '.services[] | [.host, .meshHost]'`,
		Args:              exactlyOne("name one file or folder"),
		ValidArgsFunction: completeFiles,
		RunE: func(cmd *cobra.Command, args []string) error {
			print, err := printer(f.output)
			if err != nil {
				return err
			}
			found, err := discover(cmd.Context(), f, args[0], cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			if err := print(cmd.OutOrStdout(), found); err != nil {
				return fmt.Errorf("print what was found: %w", err)
			}
			return found.err()
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.input.add(flags)
	f.mesh.add(flags)
	flags.DurationVar(&f.timeout, "timeout", 15*time.Second, "how long registries that do not answer are waited for")
	flags.StringVarP(&f.output, "output", "o", "table", "`format` of what is printed: table, json or yaml")
	flags.BoolVarP(&f.verbose, "verbose", "v", false, "log what the adapters do, on standard error")
	return cmd
}

// found is what discover found. Its JSON form is what -o json prints.
type found struct {
	Services   []foundService   `json:"services"`
	LeftOut    []foundLeftOut   `json:"leftOut"`
	Registries []foundRegistry  `json:"registries"`
	Problems   []bridge.Problem `json:"problems"`
}

type foundService struct {
	// Host is the name that the registry's convention gives, MeshHost the one that the mesh gets, if that is another.
	Host     string `json:"host"`
	MeshHost string `json:"meshHost,omitempty"`
	Port     uint32 `json:"port"`
	Protocol string `json:"protocol"`
	// Registry is the first one that contributes, as type/name.
	Registry  string          `json:"registry"`
	Endpoints []foundEndpoint `json:"endpoints"`
}

type foundEndpoint struct {
	Address  string            `json:"address"`
	Port     uint32            `json:"port"`
	Weight   uint32            `json:"weight"`
	Locality string            `json:"locality,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
}

type foundLeftOut struct {
	// Registry is namespace/bridge/type/name.
	Registry string `json:"registry"`
	bridge.LeftOut
}

type foundRegistry struct {
	// Registry is namespace/bridge/type/name.
	Registry  string       `json:"registry"`
	State     bridge.State `json:"state"`
	Services  int          `json:"services"`
	Instances int          `json:"instances"`
	Published int          `json:"published"`
	LeftOut   int          `json:"leftOut"`
	// Error is why the registry, or a part of it, could not be read; empty if it could.
	Error    string   `json:"error,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
}

// err is not nil if something could not be read.
func (f found) err() error {
	var failed []string
	for _, r := range f.Registries {
		if r.Error != "" {
			failed = append(failed, r.Registry)
		}
	}
	invalid := 0
	for _, p := range f.Problems {
		if !p.Warning {
			invalid++
		}
	}
	switch {
	case len(failed) > 0:
		return fmt.Errorf("%d of %d registries could not be read: %s", len(failed), len(f.Registries), strings.Join(failed, ", "))
	case invalid > 0:
		return fmt.Errorf("the configuration has errors: %d", invalid)
	}
	return nil
}

// discover runs a bridge whose mesh is nobody until the first answers may go out.
func discover(ctx context.Context, f discoverFlags, path string, stderr io.Writer) (found, error) {
	ctx, cancel := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer cancel()
	if f.timeout <= 0 {
		return found{}, fmt.Errorf("--timeout %s: it must be more than 0", f.timeout)
	}
	renderer, err := f.mesh.renderer()
	if err != nil {
		return found{}, err
	}
	log := slog.New(slog.DiscardHandler)
	if f.verbose {
		log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	if _, err := os.Stat(path); err != nil {
		return found{}, fmt.Errorf("read the configuration: %w", err)
	}
	mesh := &audience{opened: make(chan struct{})}
	secrets, _ := f.input.secrets(source.SecretDirOptions{Logger: log})
	files := source.NewFiles(source.FilesOptions{Path: path, DefaultsFile: f.input.registryDefaults, Logger: log})
	reading := &firstReading{from: files}
	b, err := bridge.New(bridge.Options{
		Types: types(), Source: reading, Secrets: secrets, Mesh: mesh, Renderer: renderer,
		FirstAnswerDeadline: f.timeout, VIPRange: f.mesh.vipRange, Logger: log,
	})
	if err != nil {
		return found{}, err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var running errgroup.Group
	running.Go(func() error { defer stop(); return b.Run(ctx) })
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
	var statuses []bridge.Status // with those that were given up
	for opened := false; !opened; {
		select {
		case <-mesh.opened:
			opened = true
		case <-look.C:
			if statuses == nil {
				statuses = reading.giveUp(b.Statuses())
			}
		case <-ctx.Done():
			return found{}, cmp.Or(running.Wait(), errors.New("interrupted before all registries were read"))
		}
	}
	result := collect(b, statuses, renderer)
	stop()
	return result, running.Wait()
}

// collect describes what the bridge has. Before are the statuses of registries that it may have no more.
func collect(b *bridge.Bridge, before []bridge.Status, r bridge.IstioRenderer) found {
	out := found{Services: []foundService{}, LeftOut: []foundLeftOut{}, Registries: []foundRegistry{}, Problems: []bridge.Problem{}}
	for _, s := range b.Services() {
		out.Services = append(out.Services, describe(s, r))
	}
	statuses := b.Statuses()
	for i, old := range before {
		if !slices.ContainsFunc(statuses, func(s bridge.Status) bool { return s.Key == old.Key }) {
			statuses = slices.Insert(statuses, i, old)
		}
	}
	for _, s := range statuses {
		reg := foundRegistry{
			Registry: s.Registry, State: s.State, Services: s.Services, Instances: s.Instances, Published: s.Published,
			LeftOut: len(s.LeftOutInstances), Warnings: s.Warnings,
		}
		for id, text := range s.FailedServices {
			if reg.Error == "" || text < reg.Error {
				reg.Error = fmt.Sprintf("%d services could not be read, such as %s: %s", len(s.FailedServices), id, text)
			}
		}
		if s.State != bridge.StateSynced {
			reg.Error = cmp.Or(s.ConfigError, s.LastError, reg.Error, "it did not answer in time")
		}
		out.Registries = append(out.Registries, reg)
		for _, l := range s.LeftOutInstances {
			out.LeftOut = append(out.LeftOut, foundLeftOut{s.Registry, l})
		}
	}
	problems, err := b.Problems()
	out.Problems = append(out.Problems, problems...)
	if err != nil && !slices.ContainsFunc(problems, func(p bridge.Problem) bool { return !p.Warning }) {
		out.Problems = append(out.Problems, bridge.Problem{Message: err.Error()})
	}
	return out
}

func describe(s bridge.PublishedService, r bridge.IstioRenderer) foundService {
	out := foundService{
		Host: s.Host, Port: s.Port, Protocol: string(s.Protocol), Registry: s.RegistryType + "/" + s.RegistryName,
		Endpoints: make([]foundEndpoint, 0, len(s.Endpoints)),
	}
	if host := r.Dialect.Host(s.Host); host != s.Host {
		out.MeshHost = host
	}
	for _, e := range s.Endpoints {
		out.Endpoints = append(out.Endpoints, foundEndpoint{
			Address: e.Address, Port: cmp.Or(e.Port, s.Port), Weight: max(1, e.Weight), Locality: e.Locality, Labels: e.Labels.Map(),
		})
	}
	return out
}

// audience stands where the mesh is: it waits for the first answers, and takes none.
type audience struct{ opened chan struct{} }

// Apply implements bridge.Mesh.
func (*audience) Apply([]xds.Resource, []xds.Ref) {}

// Open implements bridge.Mesh.
func (a *audience) Open() { close(a.opened) }

// printer returns the function that prints in a format.
func printer(format string) (func(io.Writer, found) error, error) {
	switch format {
	case "table":
		return printTables, nil
	case "json":
		return func(w io.Writer, f found) error {
			enc := json.NewEncoder(w)
			enc.SetIndent("", "  ")
			return enc.Encode(f)
		}, nil
	case "yaml":
		return func(w io.Writer, f found) error {
			text, err := yaml.Marshal(f)
			if err != nil {
				return err
			}
			_, err = w.Write(text)
			return err
		}, nil
	default:
		return nil, fmt.Errorf("--output %q: write table, json or yaml", format)
	}
}

// maxShown bounds the endpoints that a table's line shows.
const maxShown = 3

func printTables(out io.Writer, f found) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "Would be published:")
	if len(f.Services) == 0 {
		fmt.Fprintln(w, "nothing")
	} else {
		fmt.Fprintln(w, "HOST\tPORT\tPROTOCOL\tREGISTRY\tENDPOINTS")
	}
	for _, s := range f.Services {
		host := s.Host
		if s.MeshHost != "" {
			host += " as " + s.MeshHost
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\n", host, s.Port, s.Protocol, s.Registry, endpointsText(s))
	}
	if len(f.LeftOut) > 0 {
		fmt.Fprintf(w, "\nLeft out:\nREGISTRY\tSERVICE\tENDPOINT\tREASON\tDETAIL\n")
		for _, l := range f.LeftOut {
			where := "all of it"
			if l.Address != "" {
				where = l.Address
				if l.Port != 0 {
					where = registry.Server{Host: l.Address, Port: l.Port}.String()
				}
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", l.Registry, l.Service, where, l.Reason, oneLine(l.Detail))
		}
	}
	if len(f.Registries) > 0 {
		fmt.Fprintf(w, "\nRegistries:\nREGISTRY\tSTATE\tSERVICES\tINSTANCES\tPUBLISHED\tLEFT OUT\tERROR\n")
	}
	for _, r := range f.Registries {
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%d\t%s\n", r.Registry, r.State, r.Services, r.Instances, r.Published, r.LeftOut,
			oneLine(cmp.Or(r.Error, "-")))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	var lines []string
	for _, p := range f.Problems {
		lines = append(lines, problemLine(p))
	}
	for _, r := range f.Registries {
		for _, warning := range r.Warnings {
			if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, warning) }) {
				lines = append(lines, r.Registry+": "+warning+" (warning)")
			}
		}
	}
	if len(lines) == 0 {
		return nil
	}
	_, err := fmt.Fprintf(out, "\nConfiguration:\n%s\n", strings.Join(lines, "\n"))
	return err
}

func endpointsText(s foundService) string {
	if len(s.Endpoints) == 0 {
		return "none"
	}
	weighted := slices.ContainsFunc(s.Endpoints, func(e foundEndpoint) bool { return e.Weight != s.Endpoints[0].Weight })
	var parts []string
	for _, e := range s.Endpoints[:min(len(s.Endpoints), maxShown)] {
		part := registry.Server{Host: e.Address, Port: e.Port}.String()
		if weighted {
			part += " (weight " + strconv.FormatUint(uint64(e.Weight), 10) + ")"
		}
		parts = append(parts, part)
	}
	if more := len(s.Endpoints) - len(parts); more > 0 {
		parts = append(parts, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(parts, ", ")
}

// oneLine keeps a text within its line of a table.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
