package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// usageTemplate is cobra's, shorter, with lines of bounded length; the root command does not list the flags of the
// default command that it shares.
const usageTemplate = `Usage:
  {{.UseLine}}{{if not .HasParent}}
  {{.CommandPath}} COMMAND [flags]{{end}}{{if .HasExample}}

Examples:
{{.Example}}{{end}}{{if .HasAvailableSubCommands}}

Commands:{{range .Commands}}{{if .IsAvailableCommand}}
  {{rpad .Name .NamePadding}} {{.Short}}{{end}}{{end}}

"{{.CommandPath}} COMMAND --help" tells more about a command, and lists its flags.{{else if .HasAvailableLocalFlags}}

Flags:
{{.LocalFlags.FlagUsagesWrapped 110 | trimTrailingWhitespaces}}{{end}}
`

func newRoot() *cobra.Command {
	serve := newServe()
	root := &cobra.Command{
		Use:   "regbridge [flags]",
		Short: "Brings services of registries into an Istio or Envoy mesh",
		Long: `regbridge brings services that are registered in Nacos, Consul, ZooKeeper, Eureka, DNS or a static list into an Istio mesh: it watches McpBridge
resources, reads the registries that they name, and serves what it finds over xDS (MCP) to istiod.

Without a command it serves. Each flag of each command can also be set in the environment: --xds-address by
REGBRIDGE_XDS_ADDRESS. A flag goes before the environment.`,
		Example: `  regbridge serve --quickstart           # a first look, needs nothing
  regbridge --config /etc/regbridge      # serve what the McpBridges in a folder say
  regbridge validate bridge.yaml         # is the file good?
  regbridge discover bridge.yaml         # what would be published, and what not, and why?`,
		RunE:              serve.RunE,
		SilenceErrors:     true,
		SilenceUsage:      true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error { return flagsFromEnvironment(cmd.Flags()) },
	}
	root.Flags().AddFlagSet(serve.Flags())
	root.AddCommand(serve, newValidate(), newDiscover(), newDebug(), newRelease(), newVersion())
	root.SetUsageTemplate(usageTemplate)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if _, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
			return err
		}
		return usageError{err, cmd.CommandPath()}
	})
	for _, cmd := range root.Commands() {
		nameEnvironment(cmd.Flags())
		args := cmd.Args
		cmd.Args = func(cmd *cobra.Command, given []string) error {
			if err := args(cmd, given); err != nil {
				return usageError{err, cmd.CommandPath()}
			}
			return nil
		}
	}
	root.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageError{fmt.Errorf("unknown command %q", args[0]), cmd.CommandPath()}
		}
		return nil
	}
	return root
}

// environmentName is the environment twin of a flag.
func environmentName(flag string) string {
	return "REGBRIDGE_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// nameEnvironment adds the environment twins to the help.
func nameEnvironment(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) { f.Usage += " [$" + environmentName(f.Name) + "]" })
}

// flagsFromEnvironment sets the flags that were not given from the environment.
func flagsFromEnvironment(flags *pflag.FlagSet) error {
	var err error
	flags.VisitAll(func(f *pflag.Flag) {
		value, ok := os.LookupEnv(environmentName(f.Name))
		if err != nil || f.Changed || !ok || f.Name == "help" {
			return
		}
		if serr := flags.Set(f.Name, value); serr != nil {
			err = fmt.Errorf("environment variable %s: %w", environmentName(f.Name), serr)
		}
	})
	return err
}

// exactlyOne wants one argument; text says which.
func exactlyOne(text string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return errors.New(text)
		}
		return nil
	}
}
