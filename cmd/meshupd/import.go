package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"meshupd/cmd/meshupd/internal/control"
	"meshupd/cmd/meshupd/internal/screen"
	"meshupd/verify"
	"meshupd/verify/durable"
)

func newImportCmd(e *env) *cobra.Command {
	im := importer{env: e}
	cmd := &cobra.Command{
		Use:   "import PATH",
		Short: "Take a release from a stick or file and offer it to the site",
		Long: "Take a release from a stick or file, verify it and offer it to the site.\n" +
			"PATH is a NAME.update file, a release folder, or a folder with several of them, itself or one level below:\n" +
			"then the newest that is meant for this device is taken. A release that is refused leaves nothing behind.\n" +
			"PATH may also be a device with vfat, exfat or ext4 on it: root mounts it read-only for this command alone.",
		Example: example(
			"sudo meshupd import /media/usb0",
			"sudo meshupd import /dev/sdb1",
			"sudo meshupd import kiosk-a_2.4.0.update --json"),
		Args: takes(1, 1, "one PATH"),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch im.progress {
			case "auto", "plain", "none":
			default:
				return usage("--progress is auto, plain or none, not %q", im.progress)
			}
			im.client = e.client()
			defer im.client.Close()
			return im.reported(im.run(cmd.Context(), args[0]))
		},
	}
	cmd.Flags().BoolVar(&im.ifAny, "if-any", false, "a PATH without a release is fine")
	cmd.Flags().StringVar(&im.report, "report", "", "also write the result to this file, as JSON")
	cmd.Flags().StringVar(&im.progress, "progress", "auto", "auto, plain (a line for each 10 % or 30 s) or none")
	return talksToDaemon(e, cmd)
}

// importer streams one release to the daemon.
type importer struct {
	*env
	client   *control.Client
	progress string
	c        screen.Canvas
	skipped  []skip
	between  []string // versions to go through that were taken along
	stick    *stick   // nil unless PATH is a device
	ifAny    bool
	report   string
	result   map[string]any // what was imported
}

// skip is a release that was not taken, and why.
type skip struct {
	Path   string      `json:"path"`
	Code   verify.Code `json:"code,omitempty"`
	Detail string      `json:"detail"`
}

func (im *importer) run(ctx context.Context, path string) error {
	im.c = im.canvas(im.Err)
	began := im.now()
	if isDevice(path) {
		var err error
		if im.stick, err = mountStick(path); err != nil {
			return nothingWas("copied", err)
		}
		defer im.stick.close()
		path = im.stick.path()
	}
	sources, err := findSources(path)
	if im.ifAny && verify.CodeOf(err) == verify.CodeNotFound {
		im.sayf("%s", im.c.Clean(im.stick.shown(err.Error())))
		return nil
	}
	if err != nil {
		return nothingWas("copied", err)
	}
	im.sayf("Looking   %s in %s", count(len(sources), "release"), im.c.Clean(im.stick.shown(path)))
	src, info, err := im.choose(ctx, sources)
	if err != nil {
		return nothingWas("copied", err)
	}
	rel := info.Release
	im.sayf("  take    %s   %s %s", im.c.Clean(im.stick.shown(src.path)), im.c.Clean(rel.Product), im.c.Clean(rel.Version))
	im.sayf("Verify    signature good: %s, %s", im.c.Clean(rel.Signer), screen.Fingerprint(rel.SignerFpr))
	copied, err := im.copy(ctx, src, info)
	if err == nil {
		err = im.client.Commit(ctx, info.ID)
	}
	if err != nil {
		im.abort(ctx, info.ID)
		return nothingWas("changed", err) // bytes were copied, but nothing uses them
	}
	copied += im.takeBetween(ctx, sources, src, rel)
	return im.tell(ctx, src, info, copied, im.now().Sub(began))
}

// choose lets the daemon judge every release and takes the newest that it
// accepts: only the daemon can verify what a manifest says about its place.
func (im *importer) choose(ctx context.Context, sources []source) (source, control.ImportInfo, error) {
	var best source
	var bestInfo control.ImportInfo
	var firstErr error
	open := "" // import of the best, still open
	for _, src := range sources {
		if open != "" {
			im.abort(ctx, open)
			open = ""
		}
		info, err := im.open(ctx, src)
		switch {
		case err != nil && (len(sources) == 1 || !aboutRelease(err)):
			return source{}, control.ImportInfo{}, err
		case err != nil:
			im.skip(src, verify.CodeOf(err), err.Error())
			if firstErr == nil {
				firstErr = err
			}
		case best.path == "" || newer(info.Release, bestInfo.Release):
			if best.path != "" {
				im.skip(best, verify.CodeOrder, "older than "+info.Release.Version)
			}
			best, bestInfo, open = src, info, info.ID
		default:
			im.abort(ctx, info.ID)
			im.skip(src, verify.CodeOrder, "not newer than "+bestInfo.Release.Version)
		}
	}
	if best.path == "" {
		return best, bestInfo, verify.Refuse(verify.CodeOf(firstErr), "none of %d releases can be taken (%w)", len(sources), firstErr)
	}
	if open == "" {
		var err error
		if bestInfo, err = im.open(ctx, best); err != nil {
			return best, bestInfo, err
		}
	}
	return best, bestInfo, nil
}

// takeBetween also takes the older releases that the new one says devices have to
// go through first: after its commit the daemon refuses every other older one.
func (im *importer) takeBetween(ctx context.Context, sources []source, taken source, rel control.SiteRelease) (copied int64) {
	done := map[string]bool{taken.path: true}
	for again := true; again; {
		again = false
		for _, src := range sources {
			if done[src.path] || ctx.Err() != nil {
				continue
			}
			info, err := im.open(ctx, src)
			if err != nil {
				continue // refused before or now, as its line above says
			}
			done[src.path] = true
			n := int64(0)
			if newer(rel, info.Release) {
				im.sayf("  take    %s   %s: a version to go through", im.c.Clean(im.stick.shown(src.path)), im.c.Clean(info.Release.Version))
				if n, err = im.copy(ctx, src, info); err == nil {
					err = im.client.Commit(ctx, info.ID)
				}
				if err == nil {
					im.between = append(im.between, info.Release.Version)
					copied += n
					again = true
					continue
				}
				im.skip(src, verify.CodeOf(err), err.Error())
			}
			im.abort(ctx, info.ID)
		}
	}
	return copied
}

// aboutRelease tells a refusal of this release from an obstacle for any.
func aboutRelease(err error) bool {
	switch verify.CodeOf(err) {
	case "", verify.CodeDaemon, verify.CodePermission, verify.CodeBusy, verify.CodeUsage, verify.CodeTimeout:
		return false
	}
	return true
}

func newer(a, b control.SiteRelease) bool {
	if a.Line != b.Line {
		return a.Line > b.Line
	}
	return a.Seq > b.Seq
}

func (im *importer) open(ctx context.Context, src source) (control.ImportInfo, error) {
	head, err := src.head()
	if err != nil {
		return control.ImportInfo{}, err
	}
	return im.client.OpenImport(ctx, head)
}

func (im *importer) skip(src source, code verify.Code, detail string) {
	im.skipped = append(im.skipped, skip{im.stick.shown(src.path), code, im.stick.shown(detail)})
	im.sayf("  skip    %s   %s [%s]", im.c.Clean(im.stick.shown(src.path)), im.c.Clean(im.stick.shown(detail)), im.c.Clean(string(code)))
}

// copy sends the images that the daemon lacks and returns the number of bytes.
func (im *importer) copy(ctx context.Context, src source, info control.ImportInfo) (int64, error) {
	var total int64
	for _, img := range info.Images {
		if !img.Have {
			total += img.Size
		}
	}
	if total == 0 {
		im.sayf("Copy      nothing: all images are on this device already")
		return 0, nil
	}
	m := newMeter(im.env, im.progress, "Copy      ", total)
	err := src.images(info.Images, func(img control.ImportImage, r io.Reader) error {
		return im.client.Put(ctx, info.ID, img, io.TeeReader(r, m))
	})
	m.end(err == nil)
	return total, err
}

// abort gives an import up, also when ctx is over: the daemon then need not wait for it.
func (im *importer) abort(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	// If this does not arrive, the daemon ends the import by itself.
	_ = im.client.Abort(ctx, id)
}

func (im *importer) tell(ctx context.Context, src source, info control.ImportInfo, copied int64, took time.Duration) error {
	im.result = map[string]any{"path": im.stick.shown(src.path), "release": info.Release,
		"bytes": copied, "took_s": took.Seconds(), "skipped": append([]skip{}, im.skipped...), "through": append([]string{}, im.between...)}
	if im.json != "" {
		return im.printObject("meshupd.imported/1", im.result)
	}
	c := im.canvas(im.Out)
	fmt.Fprintf(im.Out, "Done      %s is on this device. A stick can be pulled out now.\n", c.Clean(info.Release.Version))
	// The import is done; a site that cannot be asked takes nothing from that.
	if st, err := im.client.Status(ctx, 0); err == nil {
		fmt.Fprintf(im.Out, "Site      %s in reach. Watch: meshupd status --watch\n", count(max(st.Site.Heard-1, 0), "other device"))
	}
	return nil
}

// reported leaves the result for programs that cannot read the journal: what was imported, or the code of what went wrong.
func (im *importer) reported(err error) error {
	if im.report == "" {
		return err
	}
	out := map[string]any{"at": im.now().UTC().Format(time.RFC3339), "ok": err == nil, "skipped": append([]skip{}, im.skipped...)}
	if im.result != nil {
		out["imported"] = im.result
	}
	if err != nil {
		out["code"], out["error"] = verify.CodeOf(err), im.stick.shown(err.Error())
	}
	raw, jerr := json.Marshal(map[string]any{"schema": "meshupd.import-report/1", "report": out})
	if jerr == nil {
		jerr = durable.WriteFile(im.report, append(screen.CleanJSON(raw), '\n'), 0o644)
	}
	if jerr != nil {
		im.sayf("the report is not written: %s", im.c.Clean(jerr.Error()))
	}
	return err
}
