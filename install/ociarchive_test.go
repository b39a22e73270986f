package install_test

import (
	"bytes"
	"runtime"
	"slices"
	"strings"
	"testing"

	"meshupd/install"
	"meshupd/install/ocitest"
	"meshupd/verify"
)

func TestArchiveIsMadeAnew(t *testing.T) {
	img := ocitest.Image{File: []byte("program"), Name: "docker.io/library/nginx:latest"}
	blobs := img.Blobs()
	loose := ocitest.Blob{Type: "x", Data: []byte("belongs to nothing")}
	d := blobs[0].Descriptor()
	d["annotations"] = map[string]string{"org.opencontainers.image.ref.name": "docker.io/library/nginx:latest"}
	out, manifest, config, err := install.CleanArchive(ocitest.Archive([]any{d}, append(blobs, loose)...), "localhost/meshupd/web:a")
	must(t, "open", err)
	if "sha256:"+manifest.String() != blobs[0].Digest() || "sha256:"+config.String() != blobs[1].Digest() {
		t.Fatalf("the image is said to be %s, %s", manifest, config)
	}
	for _, never := range []string{"nginx", "belongs to nothing"} {
		if bytes.Contains(out, []byte(never)) {
			t.Fatalf("the engine would be given %q", never)
		}
	}
	again, m2, c2, err := install.CleanArchive(out, "localhost/meshupd/web:a")
	must(t, "open what was made", err)
	if !bytes.Equal(again, out) || m2 != manifest || c2 != config {
		t.Fatal("made from itself the archive is another")
	}
}

func TestArchiveOfSeveralKindsOfProcessor(t *testing.T) {
	mine, other := ocitest.Image{File: []byte("mine")}.Blobs(), ocitest.Image{File: []byte("other")}.Blobs()
	on := func(b ocitest.Blob, os, arch string) map[string]any {
		d := b.Descriptor()
		d["platform"] = map[string]string{"os": os, "architecture": arch}
		return d
	}
	list := []any{on(other[0], "linux", "other"), on(mine[0], "linux", runtime.GOARCH), on(other[0], "unknown", "unknown")}
	nested := ocitest.Blob{Type: ocitest.TypeIndex, Data: ocitest.JSON(map[string]any{"schemaVersion": 2, "manifests": list})}
	all := slices.Concat(mine, other)
	for name, archive := range map[string][]byte{
		"one list":    ocitest.Archive(list, all...),
		"list inside": ocitest.Archive([]any{nested.Descriptor()}, append(all, nested)...),
	} {
		_, manifest, _, err := install.CleanArchive(archive, "x")
		must(t, name, err)
		if "sha256:"+manifest.String() != mine[0].Digest() {
			t.Fatalf("%s: the wrong image was chosen", name)
		}
	}
	_, _, _, err := install.CleanArchive(ocitest.Archive(list[:1], all...), "x")
	wantCode(t, "none for this machine", err, verify.CodeHardware)
	_, _, _, err = install.CleanArchive(ocitest.Archive([]any{list[1], other[0].Descriptor()}, all...), "x")
	wantCode(t, "two for this machine", err, verify.CodeFormat)
}

func TestArchivesThatCannotBe(t *testing.T) {
	blobs := ocitest.Image{File: []byte("program")}.Blobs()
	d := blobs[0].Descriptor()
	bent := blobs[0].Descriptor()
	bent["size"] = len(blobs[0].Data) + 1
	manifest := func(v any) []byte {
		b := ocitest.Blob{Type: ocitest.TypeManifest, Data: ocitest.JSON(v)}
		return ocitest.Archive([]any{b.Descriptor()}, append(slices.Clone(blobs[1:]), b)...)
	}
	var deep []ocitest.Blob
	for in := any(d); len(deep) < 5; in = deep[len(deep)-1].Descriptor() {
		deep = append(deep, ocitest.Blob{Type: ocitest.TypeIndex, Data: ocitest.JSON(map[string]any{"manifests": []any{in}})})
	}
	swapped := bytes.Replace(ocitest.Archive([]any{d}, blobs...), []byte(`"Entrypoint":["/app"]`), []byte(`"Entrypoint":["/bpp"]`), 1)
	for name, archive := range map[string][]byte{
		"nothing":              {},
		"no tar":               []byte(strings.Repeat("noise ", 1000)),
		"no index":             ocitest.Tar(ocitest.Entry{Name: "oci-layout", Data: []byte("{}")}),
		"the old docker form":  ocitest.Tar(ocitest.Entry{Name: "manifest.json", Data: []byte("[]")}),
		"an index twice":       append(ocitest.Tar(ocitest.Entry{Name: "index.json", Data: []byte("{}")})[:1024+512], ocitest.Archive([]any{d}, blobs...)...),
		"a blob twice":         ocitest.Archive([]any{d}, append(blobs, blobs[0])...),
		"an index of text":     ocitest.Tar(ocitest.Entry{Name: "index.json", Data: []byte("hello")}),
		"a blob too few":       ocitest.Archive([]any{d}, blobs[:2]...),
		"a size that is wrong": ocitest.Archive([]any{bent}, blobs...),
		"no layers":            manifest(map[string]any{"config": blobs[1].Descriptor()}),
		"too many layers":      manifest(map[string]any{"config": blobs[1].Descriptor(), "layers": slices.Repeat([]any{blobs[2].Descriptor()}, 513)}),
		"another digest":       manifest(map[string]any{"config": map[string]any{"digest": "md5:00", "size": 1}, "layers": []any{blobs[2].Descriptor()}}),
		"lists without end":    ocitest.Archive([]any{deep[4].Descriptor()}, append(deep, blobs...)...),
		"a config changed":     swapped,
		"too many entries":     ocitest.Tar(slices.Repeat([]ocitest.Entry{{Name: "x"}}, 4097)...),
	} {
		if _, _, _, err := install.CleanArchive(archive, "x"); verify.CodeOf(err) != verify.CodeFormat {
			t.Errorf("%s: got %v (%q), want E-FORMAT", name, err, verify.CodeOf(err))
		}
	}
}

func FuzzArchive(f *testing.F) {
	blobs := ocitest.Image{File: []byte("program")}.Blobs()
	f.Add(ocitest.Image{File: []byte("program")}.Archive())
	f.Add(ocitest.Archive([]any{blobs[0].Descriptor(), blobs[2].Descriptor()}, blobs...))
	f.Add(ocitest.Tar(ocitest.Entry{Name: "index.json", Data: []byte(`{"manifests":[{"digest":"sha256:00"}]}`)}))
	f.Fuzz(func(t *testing.T, data []byte) {
		out, manifest, config, err := install.CleanArchive(data, "localhost/meshupd/web:a")
		if err != nil {
			if verify.CodeOf(err) == "" {
				t.Fatalf("an error without a code: %v", err)
			}
			return
		}
		again, m, c, err := install.CleanArchive(out, "localhost/meshupd/web:a")
		if err != nil || m != manifest || c != config || !bytes.Equal(again, out) {
			t.Fatalf("what was made of it is not the same image: %v", err)
		}
	})
}

func FuzzEngineOutput(f *testing.F) {
	f.Add([]byte(`[{"Id":"915409d32e17a716ff06bc3c7657b33bc5b61e80ba61b878b2eccc98a6386f62","Names":["localhost/meshupd/web:b"]}]`))
	f.Add([]byte(`[{"Names":["meshupd-web-b"],"State":"running","Pid":7,"Labels":{"meshupd.spec":"x"}}]`))
	f.Add([]byte("REF TYPE DIGEST STATUS SIZE UNPACKED\nlocalhost/meshupd/web:b t sha256:a5df8e5501e66b7f42e6ea224aec3a52f79770f38a7e571abc18612b38236528 complete (2/2) 2.3 MiB/2.3 MiB true\n"))
	f.Add([]byte("TASK PID STATUS\nmeshupd-web-b 30706 RUNNING\n"))
	f.Add([]byte(`{"schema":"meshupd.services/1","sha256":"","body":{"web":{"id":"00","archive":"00"}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, name := range install.ParseEngineOutput(data) {
			if !strings.HasPrefix(name, "localhost/meshupd/") && !strings.HasPrefix(name, "meshupd-") {
				t.Fatalf("%q is not ours", name)
			}
		}
	})
}
