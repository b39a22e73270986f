package apply

import (
	"encoding/json"
	"strings"
	"testing"

	"meshupd/install"
	"meshupd/verify"
)

func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"do":"write","release":"` + strings.Repeat("ab", 32) + `"}`))
	f.Add([]byte(`{"do":"try","slot":"b"}`))
	f.Add([]byte(`{"go":true}`))
	f.Add([]byte(`{"do":"state"}{}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := parseRequest(line)
		if err != nil {
			if code := verify.CodeOf(err); code != verify.CodeFormat && code != verify.CodeSize && code != verify.CodeBoot {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		if len(line) > maxLine {
			t.Fatal("a line of any length is read")
		}
		raw, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseRequest(raw); err != nil || again.Do != r.Do || again.Slot != r.Slot || again.Go != r.Go {
			t.Fatalf("%s is read as %+v, and that as %+v, %v", line, r, again, err)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{}`))
	f.Add([]byte(`{"done":1,"total":2}`))
	f.Add([]byte(`{"end":true,"code":"E-SPACE","detail":"full","need_bytes":7}`))
	f.Add([]byte(`{"end":true,"state":{"phase":"trial","booted":"b","default":"a","trial":"b","slots":{"a":{"release":"` + strings.Repeat("0", 64) + `","version":"1","whole":true}}}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		a, err := parseAnswer(line)
		if err != nil {
			return
		}
		if a.Done > a.Total || a.NeedBytes < 0 || !a.End && a.err() != nil {
			t.Fatalf("%s is believed: %+v", line, a)
		}
		if a.State != nil && (a.State.Booted.Other().Other() != a.State.Booted || len(a.State.Slots) > 2) {
			t.Fatalf("a state that cannot be is believed: %+v", a.State)
		}
		if err := a.err(); err != nil && (err.Error() == "" || len(err.Error()) > 2*maxDetail || strings.ContainsAny(err.Error(), "\x1b\n")) {
			t.Fatalf("the error %q would be shown", err)
		}
	})
}

// What the server says fits a line and is believed by the client, whatever went wrong.
func TestEveryAnswerIsALine(t *testing.T) {
	long := verify.Refuse(verify.CodeSpace, "%s\x1b[2J", strings.Repeat("much \"quoted\" \\ text ", 1000))
	for _, a := range []answer{failed(long), failed(nil), failed(install.CheckImages(nil, nil))} {
		raw, err := json.Marshal(a)
		if err != nil || len(raw) >= maxLine {
			t.Fatalf("%d bytes, %v", len(raw), err)
		}
		if got, err := parseAnswer(raw); err != nil || verify.CodeOf(got.err()) != a.Code {
			t.Fatalf("%s is read as %+v, %v", raw, got, err)
		}
	}
}
