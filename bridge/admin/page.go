package admin

import (
	"bytes"
	"embed"
	"html/template"
	"net/http"
	"strings"
	"time"

	"github.com/regbridge/regbridge/bridge"
)

//go:embed page.html
var pageFile embed.FS

var pageTemplate = template.Must(template.New("page.html").Funcs(template.FuncMap{"age": age, "problem": problemText}).
	ParseFS(pageFile, "page.html"))

// maxProblems bounds the findings of a kind that the page shows; all are at /debug/problems and /debug/registries.
const maxProblems = 20

// index is the page for people.
func (a *Admin) index(w http.ResponseWriter, pages []page) {
	ready, reasons := a.ready()
	data := struct {
		Version     string
		Ready       bool
		Reasons     []string
		Registries  []bridge.Status
		Services    int
		Endpoints   int
		Held        int
		Quarantined []bridge.LeftOut
		Clients     int
		ConfigError string
		Problems    []bridge.Problem
		More        int // problems that are not shown
		Pages       []page
	}{
		Version: a.opts.Version, Ready: ready, Reasons: reasons, Registries: a.opts.Bridge.Statuses(),
		Clients: len(a.opts.Cache.Clients()), Pages: pages,
	}
	for _, s := range a.opts.Bridge.Services() {
		data.Services++
		data.Endpoints += len(s.Endpoints)
	}
	for _, r := range data.Registries {
		data.Held += r.Held
		for _, l := range r.LeftOutInstances {
			if l.Reason == bridge.ReasonQuarantined && len(data.Quarantined) < maxProblems {
				data.Quarantined = append(data.Quarantined, l)
			}
		}
	}
	problems, err := a.opts.Bridge.Problems()
	if err != nil {
		data.ConfigError = err.Error()
	}
	data.Problems = problems[:min(len(problems), maxProblems)]
	data.More = len(problems) - len(data.Problems)

	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, data); err != nil {
		http.Error(w, "make the page: "+err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
	_, _ = b.WriteTo(w) // a reader that is gone is of no interest
}

// age says how long ago something was; t may be nil.
func age(t *time.Time) string {
	if t == nil {
		return "never"
	}
	d := max(0, time.Since(*t))
	if d < 10*time.Minute {
		return d.Truncate(time.Second).String() + " ago"
	}
	return strings.TrimSuffix(d.Truncate(time.Minute).String(), "0s") + " ago"
}

func problemText(p bridge.Problem) string {
	if p.Path == "" {
		return p.Message
	}
	return p.Path + ": " + p.Message
}
