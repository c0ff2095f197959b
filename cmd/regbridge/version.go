package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is the release, if the program was built as one; the linker sets it.
var version string

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			b := readBuild()
			fmt.Fprintf(cmd.OutOrStdout(), "regbridge %s\ncommit    %s\nbuilt     %s %s/%s\n", b.version, b.commit, runtime.Version(),
				runtime.GOOS, runtime.GOARCH)
			return nil
		},
	}
}

// build is what Go noted about the program when it was built.
type build struct{ version, commit string }

func readBuild() build {
	b := build{version: cmp.Or(version, "(devel)"), commit: "unknown"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	b.version = cmp.Or(version, info.Main.Version, b.version)
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	if revision := settings["vcs.revision"]; revision != "" {
		b.commit = revision + " of " + settings["vcs.time"]
		if settings["vcs.modified"] == "true" {
			b.commit += ", with changes"
		}
	}
	return b
}
