package main

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"github.com/regbridge/regbridge/bridge"
	"github.com/regbridge/regbridge/bridge/source"
	"github.com/regbridge/regbridge/registry"
)

func newValidate() *cobra.Command {
	var defaults, output string
	cmd := &cobra.Command{
		Use:   "validate FILE... [flags]",
		Short: "Tell what is wrong with configuration files",
		Long: `validate reads McpBridges and connects to nothing. It prints every problem with its place, as "file:line: field: message".
Its exit status is 1 if there is an error; warnings alone leave it at 0. A folder stands for the files in it. Unknown
fields, which serve only warns of, are errors here.`,
		Example: `  regbridge validate bridge.yaml
  regbridge validate -o json /etc/regbridge
  kubectl get mcpbridge -A -o yaml | regbridge validate /dev/stdin`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("name at least one file or folder")
			}
			return nil
		},
		ValidArgsFunction: completeFiles,
		RunE: func(cmd *cobra.Command, args []string) error {
			problems := source.Validate(args, source.ValidateOptions{DefaultsFile: defaults, Check: check})
			failed := false
			for _, p := range problems {
				failed = failed || !p.Warning
			}
			switch output {
			case "text":
				for _, p := range problems {
					fmt.Fprintln(cmd.OutOrStdout(), problemLine(p))
				}
				if len(problems) == 0 {
					fmt.Fprintln(cmd.OutOrStdout(), "no problems")
				}
			case "json":
				enc := json.NewEncoder(cmd.OutOrStdout())
				enc.SetIndent("", "  ")
				if err := enc.Encode(append([]bridge.Problem{}, problems...)); err != nil {
					return err
				}
			default:
				return fmt.Errorf("--output %q: write text or json", output)
			}
			if failed {
				return errReported
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&defaults, "registry-defaults", "", "`file` with settings for entries that do not have them, checked too")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "`format` of what is printed: text or json")
	return cmd
}

// problemLine gives a problem as a line of output.
func problemLine(p bridge.Problem) string {
	if p.Warning {
		p.Message += " (warning)"
	}
	return source.Text(p)
}

// check runs the constructor of an entry, which opens nothing.
func check(rc bridge.RegistryConfig) error {
	_, err := bridge.Construct(types(), rc.Entry, registry.Env{
		Credentials: func() (registry.Credentials, error) { return registry.Credentials{}, nil },
		ClientTLS:   func() (*tls.Config, error) { return nil, nil }, //nolint:nilnil // plain text
		Logger:      slog.New(slog.DiscardHandler),
		Observe:     func(string, time.Duration, error) {},
		Budgets:     &registry.Budgets{},
	})
	return err
}
