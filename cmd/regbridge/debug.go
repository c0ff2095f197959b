package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// adminFlags say how to reach a running daemon.
type adminFlags struct {
	address string
	timeout time.Duration
}

func (f *adminFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.address, "admin-address", defaultAdminAddress, "`host:port` of the admin pages of a running regbridge")
	flags.DurationVar(&f.timeout, "timeout", 2*time.Minute, "how long the whole answer may take")
}

// debugPages are the pages that the debug command prints, by its argument.
func debugPages() map[string]string {
	return map[string]string{
		"registryz": "/debug/registryz", "endpointShardz": "/debug/endpointShardz", "configz": "/debug/configz",
		"registries": "/debug/registries", "clients": "/debug/clients", "problems": "/debug/problems",
	}
}

func newDebug() *cobra.Command {
	var f adminFlags
	var query struct{ registry, kind, name string }
	pages := debugPages()
	cmd := &cobra.Command{
		Use:   "debug PAGE [flags]",
		Short: "Print a debug page of a running regbridge",
		Long: `debug prints one of the debug pages of a regbridge that runs, as JSON:

  registryz        the services, in istiod's form
  endpointShardz   their endpoints, in istiod's form
  configz          the resources as they are sent, in istiod's form; --kind and --name select
  registries       each registry: state, last sync and error, held endpoints, what is left out and why; --registry selects
  clients          the xDS clients: what they asked for, were sent, took and refused
  problems         what is wrong with the configuration`,
		Example: `  regbridge debug registryz
  regbridge debug registries --registry consul/my-consul
  regbridge debug configz --kind DestinationRule
  kubectl exec deploy/regbridge -- regbridge debug registryz | jq -r '.[].hostname'`,
		ValidArgs: slices.Sorted(maps.Keys(pages)),
		Args: func(_ *cobra.Command, args []string) error {
			known := slices.Sorted(maps.Keys(pages))
			if len(args) != 1 {
				return fmt.Errorf("name one page: %s", strings.Join(known, ", "))
			}
			if !slices.ContainsFunc(known, func(p string) bool { return strings.EqualFold(p, args[0]) }) {
				return fmt.Errorf("unknown page %q: name one of %s", args[0], strings.Join(known, ", "))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			values := url.Values{}
			for key, v := range map[string]string{"registry": query.registry, "kind": query.kind, "name": query.name} {
				if v != "" {
					values.Set(key, v)
				}
			}
			for name, path := range pages {
				if strings.EqualFold(name, args[0]) {
					return f.call(cmd.Context(), http.MethodGet, path, values, func(body io.Reader) error {
						_, err := io.Copy(cmd.OutOrStdout(), body)
						return err
					})
				}
			}
			return nil // Args has refused it
		},
	}
	flags := cmd.Flags()
	f.add(flags)
	flags.StringVar(&query.registry, "registry", "", "registries alone: only the registries with this `name`, type/name, or namespace/bridge/type/name")
	flags.StringVar(&query.kind, "kind", "", "configz alone: only resources of this `kind`")
	flags.StringVar(&query.name, "name", "", "configz alone: only resources with this `name`, or namespace/name")
	return cmd
}

func newRelease() *cobra.Command {
	var f adminFlags
	cmd := &cobra.Command{
		Use:   "release REGISTRY [flags]",
		Short: "Let go the endpoints that are held of a registry",
		Long: `release tells a running regbridge to believe what a registry lists: endpoints that it keeps although the registry no longer
lists them are removed at once. The registry is named by the entry's name, type/name, or namespace/bridge/type/name; all
registries that have the name are meant. "regbridge debug registries" shows what is held, and why.`,
		Example: `  regbridge release my-consul
  regbridge release higress-system/default/consul/my-consul --admin-address 127.0.0.1:8888`,
		Args: exactlyOne("name one registry"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.call(cmd.Context(), http.MethodPost, "/release", url.Values{"registry": args}, func(body io.Reader) error {
				var answer struct{ Released map[string]int }
				if err := json.NewDecoder(body).Decode(&answer); err != nil {
					return err
				}
				for _, name := range slices.Sorted(maps.Keys(answer.Released)) {
					fmt.Fprintf(cmd.OutOrStdout(), "%s: %d endpoints released\n", name, answer.Released[name])
				}
				return nil
			})
		},
	}
	f.add(cmd.Flags())
	return cmd
}

// call sends one request to the admin pages, and hands a good answer to read.
func (f *adminFlags) call(ctx context.Context, method, path string, query url.Values, read func(io.Reader) error) error {
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	address := reachable(f.address)
	to := url.URL{Scheme: "http", Host: address, Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, to.String(), nil)
	if err != nil {
		return fmt.Errorf("--admin-address %s: %w", f.address, err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // and without a proxy
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("reach the admin pages at %s (is regbridge running, and is that its --admin-address?): %w", address, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // what there is
		return fmt.Errorf("%s answered %s: %s", address, resp.Status, strings.TrimSpace(string(text)))
	}
	if err := read(resp.Body); err != nil {
		return fmt.Errorf("read the answer of %s: %w", &to, err)
	}
	return nil
}

// reachable returns the address under which a listening address is reached from the same machine.
func reachable(listening string) string {
	host, port, err := net.SplitHostPort(listening)
	if err != nil {
		return listening
	}
	if a, err := netip.ParseAddr(host); host == "" || err == nil && a.IsUnspecified() {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}
