package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/grpclog"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/bridge/admin"
	"github.com/regbridge/regbridge/bridge/source"
	"github.com/regbridge/regbridge/mcp/istio"
	"github.com/regbridge/regbridge/mcp/xds"
)

const defaultAdminAddress = "127.0.0.1:8888"

// serveFlags are the flags of serve.
type serveFlags struct {
	config     string
	quickstart bool
	stateDir   string
	deadline   time.Duration

	xdsAddress string
	shards     []string
	tls        xds.TLS
	admin      string
	health     string
	pprof      bool

	input inputFlags
	mesh  meshFlags
	log   logFlags
}

func newServe() *cobra.Command {
	var f serveFlags
	cmd := &cobra.Command{
		Use:   "serve [flags]",
		Short: "Read registries and serve what they have (the default command)",
		Long: `serve runs the daemon: it follows the McpBridges in a file or folder, reads the registries that they name, and serves
their services over xDS. It ends on SIGTERM or SIGINT, after its streams have ended; a second signal ends it at once.
SIGHUP is ignored: edits are followed without it.

Clients get no answer before every registry was read once, or --first-answer-deadline is over: whatever is missing from a
first answer is deleted. With --state-dir a restart forgets nothing, also while a registry is down.`,
		Example: `  regbridge serve --quickstart
  regbridge serve --config bridge.yaml --secrets-dir ./secrets
  regbridge serve --config /etc/regbridge --state-dir /var/lib/regbridge --health-address :8889
  regbridge serve --config /etc/regbridge --xds-shards 16@:15100`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if (f.config == "") == !f.quickstart {
				return usageError{errors.New("--config FILE or --config DIR says what to serve; or use --quickstart for a first look"),
					cmd.CommandPath()}
			}
			return serve(cmd.Context(), f, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVar(&f.config, "config", "", "`file or folder` with McpBridges; edits are followed")
	flags.BoolVar(&f.quickstart, "quickstart", false, "serve the built-in example in place of --config")
	f.input.add(flags)
	flags.StringVar(&f.stateDir, "state-dir", "", "`folder` for snapshots, so that a restart forgets nothing; empty keeps none")
	flags.DurationVar(&f.deadline, "first-answer-deadline", bridge.DefaultFirstAnswerDeadline,
		"how long first answers wait for registries that cannot be read")
	flags.StringVar(&f.xdsAddress, "xds-address", ":15051", "`host:port` for xDS clients")
	flags.StringSliceVar(&f.shards, "xds-shards", nil,
		"`N@host:port`: serve the N shards of everything on N ports from this one on; may be repeated")
	flags.StringVar(&f.tls.CertFile, "xds-tls-cert", "", "`file` with the certificate of the xDS ports, PEM; re-read when it changes")
	flags.StringVar(&f.tls.KeyFile, "xds-tls-key", "", "`file` with its key")
	flags.StringVar(&f.tls.ClientCAFile, "xds-client-ca", "", "`file` with the CA of xDS clients' certificates")
	flags.StringVar(&f.tls.ClientAuth, "xds-client-auth", xds.ClientAuthNone,
		"certificates of xDS clients: none, optional or require (istiod has none)")
	f.mesh.add(flags)
	flags.StringVar(&f.admin, "admin-address", defaultAdminAddress, "`host:port` of the admin pages; keep it on loopback")
	flags.StringVar(&f.health, "health-address", "", "`host:port` for /livez, /readyz and /metrics alone; empty opens none")
	flags.BoolVar(&f.pprof, "pprof", false, "add /debug/pprof/ to the admin pages")
	f.log.add(flags)
	return cmd
}

// xdsPorts names the flags of the xDS ports in messages.
func (f *serveFlags) xdsPorts() string {
	text := "--xds-address " + f.xdsAddress
	if len(f.shards) > 0 {
		text += ", --xds-shards " + strings.Join(f.shards, ",")
	}
	return text
}

// serve runs the daemon until ctx ends or a signal comes. The ports are opened first, so that what is wrong with them is
// told before anything has happened.
func serve(ctx context.Context, f serveFlags, stdout, stderr io.Writer) error {
	ctx, ignoreSignals := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer ignoreSignals()
	signal.Ignore(syscall.SIGHUP) // which would end us at once, where others read their configuration again
	log, err := f.log.logger(stderr)
	if err != nil {
		return err
	}
	// gRPC logs by itself what it also returns to us.
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	d := daemon{flags: f, log: log}
	defer d.close()
	if err := d.open(); err != nil {
		return err
	}
	if f.quickstart {
		fmt.Fprint(stdout, d.hints())
	}
	return d.run(ctx, ignoreSignals)
}

// A daemon is all that serve runs.
type daemon struct {
	flags  serveFlags
	log    *slog.Logger
	temp   string // our own folder, removed at the end
	config string // file or folder

	adminPort, healthPort net.Listener
	admin                 *admin.Admin
	server                *xds.Server
	bridge                *bridge.Bridge
	secrets               *source.SecretDir // nil without a folder
}

// open makes everything, and opens the ports.
func (d *daemon) open() (err error) {
	f := d.flags
	if f.deadline <= 0 {
		return fmt.Errorf("--first-answer-deadline %s: it must be more than 0", f.deadline)
	}
	if err := checkAddress("--xds-address", f.xdsAddress); err != nil {
		return err
	}
	shards, counts, err := parseShards(f.shards)
	if err != nil {
		return err
	}
	renderer, err := f.mesh.renderer()
	if err != nil {
		return err
	}
	if err := checkTLS(f.tls); err != nil {
		return err
	}
	metrics := prometheus.NewRegistry()
	cache := xds.NewCache(xds.Options{Published: istio.Published(), ShardCounts: counts, Logger: d.log, Registerer: metrics})
	d.server, err = xds.NewServer(cache, xds.ServerOptions{Address: f.xdsAddress, Shards: shards, TLS: f.tls, Logger: d.log})
	if err != nil {
		return fmt.Errorf("%s: %w", f.xdsPorts(), err)
	}
	if d.adminPort, err = listen("--admin-address", f.admin); err != nil {
		return err
	}
	if f.health != "" {
		if d.healthPort, err = listen("--health-address", f.health); err != nil {
			return err
		}
	}
	if err := d.server.Listen(); err != nil {
		if _, ok := errors.AsType[*net.OpError](err); ok {
			return fmt.Errorf("%s: %w", f.xdsPorts(), err)
		}
		return fmt.Errorf("--xds-tls-cert, --xds-tls-key, --xds-client-ca: %w", err)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(50) // most of the heap lives long: this keeps a million endpoints below 1 KB each
	}
	d.config = f.config
	if f.quickstart {
		if d.temp, err = os.MkdirTemp("", "regbridge-"); err != nil {
			return fmt.Errorf("make a folder for the quickstart: %w", err)
		}
		if d.config, err = extractQuickstart(d.temp); err != nil {
			return err
		}
	}
	var secrets bridge.Secrets
	secrets, d.secrets = f.input.secrets(source.SecretDirOptions{Logger: d.log})
	d.bridge, err = bridge.New(bridge.Options{
		Types:    types(),
		Source:   source.NewFiles(source.FilesOptions{Path: d.config, DefaultsFile: f.input.registryDefaults, Logger: d.log}),
		Secrets:  secrets,
		Mesh:     cache,
		Renderer: renderer,
		StateDir: f.stateDir,

		FirstAnswerDeadline: f.deadline,
		Coalesce:            bridge.DefaultCoalesce,
		VIPRange:            f.mesh.vipRange,
		Logger:              d.log,
		Registerer:          metrics,
	})
	if err != nil {
		return fmt.Errorf("--state-dir %s: %w", f.stateDir, err)
	}
	release := readBuild().version
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "regbridge_build_info", Help: "1, with the version as a label.", ConstLabels: prometheus.Labels{"version": release},
	})
	info.Set(1)
	metrics.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	d.admin = admin.New(admin.Options{Bridge: d.bridge, Cache: cache, Gatherer: metrics, Version: release, Pprof: f.pprof})
	return nil
}

// close takes back what open did, after run or in its place.
func (d *daemon) close() {
	for _, l := range []net.Listener{d.adminPort, d.healthPort} {
		if l != nil {
			_ = l.Close() // closed already if it was served
		}
	}
	if d.temp == "" {
		return
	}
	if err := os.RemoveAll(d.temp); err != nil {
		d.log.Warn("remove the temporary folder", "error", err)
	}
}

// run serves until ctx ends or something that nothing can do without fails. Then readiness goes, the streams end, the
// adapters stop and the last snapshot is written; the admin pages answer until all that is done. stopping is called when
// it begins.
func (d *daemon) run(ctx context.Context, stopping func()) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	pagesCtx, endPages := context.WithCancel(context.WithoutCancel(ctx))
	defer endPages()
	var pages errgroup.Group
	serve := func(what string, l net.Listener, a func() error) {
		d.log.Info("serving "+what, "address", l.Addr().String())
		pages.Go(func() error {
			defer stop()
			return a()
		})
	}
	serve("admin", d.adminPort, func() error { return admin.Serve(pagesCtx, d.adminPort, d.admin.Handler(), d.log) })
	if d.healthPort != nil {
		serve("health", d.healthPort, func() error { return admin.Serve(pagesCtx, d.healthPort, d.admin.HealthHandler(), d.log) })
	}
	base, shards := d.server.Addresses()
	d.log.Info("serving xds", "address", base.String(), "dialect", d.flags.mesh.dialect)
	for count, addresses := range shards {
		d.log.Info("serving xds shards", "count", count, "address", addresses[0].String())
	}

	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() error { return d.server.Run(ctx) })
	work.Go(func() error { return d.bridge.Run(ctx) })
	if d.secrets != nil {
		work.Go(func() error { return d.secrets.Run(ctx, d.bridge.SecretsChanged) })
	}
	work.Go(func() error {
		<-ctx.Done()
		d.admin.Drain()
		stopping()
		d.log.Info("stopping")
		return nil
	})
	err := work.Wait()
	endPages()
	return errors.Join(err, pages.Wait())
}

func listen(flag, address string) (net.Listener, error) {
	if err := checkAddress(flag, address); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", flag, address, err)
	}
	return l, nil
}

func checkAddress(flag, address string) error {
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf("%s %q: write host:port or :port", flag, address)
	}
	return nil
}

// parseShards reads the values of --xds-shards: "16@:15100".
func parseShards(values []string) (shards []xds.ShardListen, counts []int, err error) {
	for _, v := range values {
		count, address, ok := strings.Cut(strings.TrimSpace(v), "@")
		n, err := strconv.Atoi(count)
		switch {
		case !ok || err != nil:
			return nil, nil, fmt.Errorf("--xds-shards %q: write N@host:port, such as 16@:15100", v)
		case n < 2 || n > 256:
			return nil, nil, fmt.Errorf("--xds-shards %q: the number of shards is from 2 to 256", v)
		case slices.Contains(counts, n):
			return nil, nil, fmt.Errorf("--xds-shards %q: %d shards are asked for twice", v, n)
		}
		if err := checkAddress("--xds-shards "+count+"@", address); err != nil {
			return nil, nil, err
		}
		shards, counts = append(shards, xds.ShardListen{Count: n, Address: address}), append(counts, n)
	}
	return shards, counts, nil
}

// checkTLS names the flags in what is wrong with them together.
func checkTLS(t xds.TLS) error {
	switch {
	case (t.CertFile == "") != (t.KeyFile == ""):
		return errors.New("--xds-tls-cert and --xds-tls-key: set both or none")
	case !slices.Contains([]string{xds.ClientAuthNone, xds.ClientAuthOptional, xds.ClientAuthRequire}, t.ClientAuth):
		return fmt.Errorf("--xds-client-auth %q: write none, optional or require", t.ClientAuth)
	case t.ClientAuth == xds.ClientAuthNone && t.ClientCAFile != "":
		return errors.New("--xds-client-ca has no use without --xds-client-auth optional or require")
	case t.ClientAuth != xds.ClientAuthNone && t.ClientCAFile == "":
		return fmt.Errorf("--xds-client-auth %s: set --xds-client-ca", t.ClientAuth)
	case t.ClientAuth != xds.ClientAuthNone && t.CertFile == "":
		return fmt.Errorf("--xds-client-auth %s: clients show certificates over TLS alone: set --xds-tls-cert and --xds-tls-key", t.ClientAuth)
	}
	return nil
}
