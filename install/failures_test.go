package install

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"meshupd/verify"
)

func failure(n int) Failure {
	return Failure{Release: verify.Digest{byte(n), byte(n >> 8), 1}, Version: "2.0.0", Code: verify.CodeHealth, Detail: "the pump is stuck",
		At: time.Unix(int64(n), 0).UTC()}
}

func openFailures(t *testing.T, dir string) *Failures {
	t.Helper()
	f, err := OpenFailures(dir)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestFailuresOutliveTheDaemon(t *testing.T) {
	dir := t.TempDir()
	f := openFailures(t, dir)
	for n := range maxFailures + 3 {
		if err := f.Record(failure(n)); err != nil {
			t.Fatal(err)
		}
	}
	again := failure(10)
	again.Detail = "twice\x1b[31m, by " + string(bytes.Repeat([]byte("é"), 1000))
	if err := f.Record(again); err != nil {
		t.Fatal(err)
	}
	f = openFailures(t, dir)
	all := f.All()
	if len(all) != maxFailures || all[0] != failure(3) || all[len(all)-1].Release != again.Release {
		t.Fatalf("%d failures, from %+v to %+v", len(all), all[0], all[len(all)-1])
	}
	if got, _ := f.Failed(again.Release); len([]rune(got.Detail)) != maxDetail || got.Detail[:13] != "twice[31m, by" {
		t.Fatalf("the detail is %q", got.Detail)
	}
	if _, found := f.Failed(failure(2).Release); found {
		t.Fatal("the oldest was not dropped")
	}
	if err := f.Forgive(failure(3).Release); err != nil {
		t.Fatal(err)
	}
	if err := f.Forgive(failure(3).Release); err != nil {
		t.Fatal(err)
	}
	if _, found := openFailures(t, dir).Failed(failure(3).Release); found {
		t.Fatal("a forgiven failure came back")
	}
	if err := f.Record(Failure{Code: verify.CodeBoot}); err != nil || len(f.All()) != maxFailures-1 {
		t.Fatalf("a failure of the factory's slot: %v, %d failures", err, len(f.All()))
	}
}

func TestDamagedFailuresAreSetAside(t *testing.T) {
	dir := t.TempDir()
	if err := openFailures(t, dir).Record(failure(1)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "failed.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data = bytes.Replace(data, []byte("2.0.0"), []byte("2.0.1"), 1)
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFailures(dir)
	if verify.CodeOf(err) != verify.CodeFormat || f == nil {
		t.Fatalf("got %v and %v", f, err)
	}
	if bad, err := os.ReadFile(path + ".bad"); err != nil || !bytes.Equal(bad, data) {
		t.Fatalf("the damaged file was not kept: %v", err)
	}
	if err := f.Record(failure(2)); err != nil {
		t.Fatal(err)
	}
	if got := openFailures(t, dir).All(); len(got) != 1 || got[0] != failure(2) {
		t.Fatalf("after the damage: %+v", got)
	}
}

func TestAFailureThatCannotBeSavedIsNotRemembered(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	f := openFailures(t, dir)
	if err := f.Record(failure(1)); verify.CodeOf(err) != verify.CodeIO {
		t.Fatalf("got %v", err)
	}
	if len(f.All()) != 0 {
		t.Fatal("the memory says more than the disk")
	}
}

func FuzzFailures(f *testing.F) {
	data, err := seal(failuresSchema, []Failure{failure(1).tidy(), failure(2).tidy()})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(bodyOf(f, data))
	f.Add([]byte(`{"schema":"meshupd.failures/1","sha256":"","body":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := parseFailures(resealed(failuresSchema, data))
		if err != nil && list != nil || len(list) > maxFailures {
			t.Fatalf("%d failures with %v", len(list), err)
		}
	})
}
