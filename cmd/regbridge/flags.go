package main

import (
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/bridge/source"
	"github.com/regbridge/regbridge/mcp/istio"
	"github.com/regbridge/regbridge/registry"
	"github.com/regbridge/regbridge/registry/builtin"
)

// inputFlags say what belongs to the configuration beside the McpBridges themselves.
type inputFlags struct{ secretsDir, registryDefaults string }

func (f *inputFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.secretsDir, "secrets-dir", "",
		"`folder` with the Secrets that entries name: a YAML Secret per file, or a folder per Secret as a mount has")
	flags.StringVar(&f.registryDefaults, "registry-defaults", "", "`file` with settings for entries that do not have them")
}

// meshFlags say who reads what is published.
type meshFlags struct {
	dialect, higressNamespace string
	vipRange                  netip.Prefix
}

func (f *meshFlags) add(flags *pflag.FlagSet) {
	flags.StringVar(&f.dialect, "dialect", "istio", "what the reader accepts: istio (stock istiod) or higress (Higress's own)")
	flags.StringVar(&f.higressNamespace, "higress-namespace", "higress-system", "`namespace` of Higress's gateway, for --dialect higress")
	flags.TextVar(&f.vipRange, "vip-range", netip.MustParsePrefix(bridge.DefaultVIPRange),
		"`prefix` from which TCP services get virtual addresses; nothing else may use it")
}

func (f *meshFlags) renderer() (bridge.IstioRenderer, error) {
	dialect, err := istio.ParseDialect(f.dialect, f.higressNamespace)
	if err != nil {
		name := "--dialect"
		if f.dialect == "higress" {
			name = "--higress-namespace"
		}
		return bridge.IstioRenderer{}, fmt.Errorf("%s: %w", name, err)
	}
	base := f.vipRange.Addr()
	switch {
	case base.BitLen()-f.vipRange.Bits() < 8:
		return bridge.IstioRenderer{}, fmt.Errorf("--vip-range %s: it has fewer than 256 addresses; take a larger one", f.vipRange)
	case f.vipRange.Bits() < 8, base.IsLoopback(), base.IsMulticast(), base.IsLinkLocalUnicast(), base.IsUnspecified(), base.Is4In6():
		return bridge.IstioRenderer{}, fmt.Errorf("--vip-range %s: sidecars cannot use these addresses; take an unused private range, such as %s",
			f.vipRange, bridge.DefaultVIPRange)
	}
	return bridge.IstioRenderer{Dialect: dialect}, nil
}

// noSecrets stands where --secrets-dir is not set.
type noSecrets struct{}

// Get implements bridge.Secrets.
func (noSecrets) Get(namespace, name string) (registry.Credentials, error) {
	return nil, fmt.Errorf("%w: %s/%s: set --secrets-dir", bridge.ErrSecretMissing, namespace, name)
}

// secrets returns the Secrets, and the folder that they come from, nil if there is none.
func (f *inputFlags) secrets(o source.SecretDirOptions) (bridge.Secrets, *source.SecretDir) {
	if f.secretsDir == "" {
		return noSecrets{}, nil
	}
	o.Dir = f.secretsDir
	dir := source.NewSecretDir(o)
	_ = dir.Load() // it logs what is wrong, and so does each registry that needs one of them
	return dir, dir
}

// types returns the registry types.
func types() map[string]bridge.Constructor {
	out := map[string]bridge.Constructor{}
	for name, construct := range builtin.Types() {
		out[name] = construct
	}
	return out
}

// completeFiles completes the names of configuration files.
func completeFiles(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return []string{"yaml", "yml", "json"}, cobra.ShellCompDirectiveFilterFileExt
}
