package peer

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"meshupd/verify"
)

func neighbours(t *testing.T) (a, b *testMesh) {
	t.Helper()
	a, b = startMesh(t, nil), startMesh(t, nil)
	a.sees(b)
	a.until("a admits b", func() bool { return a.connectedTo(b.ID()) })
	b.until("b admits a", func() bool { return b.connectedTo(a.ID()) })
	return a, b
}

func TestLargeHeadIsPulled(t *testing.T) {
	a, b := neighbours(t)
	head := bytes.Repeat([]byte("0123456789abcdef"), 2*maxGossip/16)
	id := a.hold(head)
	if err := a.docs.spread(t.Context(), head); err != nil {
		t.Fatal(err)
	}
	b.until("b holds the head", func() bool { return b.holds(id) })
	if !bytes.Equal(b.head(id), head) {
		t.Error("the head changed on its way")
	}
}

func TestForgedHeadsAreCountedAndTheirSenderRefused(t *testing.T) {
	a, b := neighbours(t)
	a.hold([]byte("late, but honest")) // pulled, not taken, and no reason to refuse a
	for i := range maxStrikes {
		a.hold([]byte("forged " + strings.Repeat("x", i)))
	}
	a.docs.changed()
	b.until("b refuses a", func() bool { return b.adm.isBanned(a.self) })
	b.until("the connection is closed", func() bool { return !b.connectedTo(a.ID()) })
	if n := b.checks(); n > maxStrikes+1 {
		t.Errorf("b checked %d heads", n)
	}
	a.until("a lost b", func() bool { return !a.connectedTo(b.ID()) })
}

func TestSameBytesAreCheckedOnce(t *testing.T) {
	m := newTestMesh(t, t.TempDir(), nil)
	_, from := testKey(t)
	for range 5 {
		if v := m.docs.heads.judge(t.Context(), from, []byte("news")); v != headBelieved {
			t.Errorf("verdict %d", v)
		}
		if v := m.docs.heads.judge(t.Context(), from, []byte("forged")); v != headForged {
			t.Errorf("verdict %d", v)
		}
		if v := m.docs.heads.judge(t.Context(), from, []byte("late")); v != headUnwelcome {
			t.Errorf("verdict %d", v)
		}
	}
	if n := m.checks(); n != 3 {
		t.Errorf("%d checks", n)
	}
	if m.adm.isBanned(from) {
		t.Error("one forged head, repeated by others, was counted several times")
	}
}

func TestHeadAnswer(t *testing.T) {
	size := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	tests := []struct {
		name   string
		answer []byte
		want   string
		code   verify.Code
		ok     bool
	}{
		{"a head", append(size(4), "head"...), "head", "", true},
		{"not here", size(0), "", "", true},
		{"too large", size(verify.MaxHead + 1), "", verify.CodeSize, false},
		{"claims more than it sends", append(size(verify.MaxHead), "head"...), "", "", false},
		{"cut", []byte{0, 0}, "", "", false},
	}
	for _, tt := range tests {
		head, err := readHeadAnswer(bytes.NewReader(tt.answer))
		if string(head) != tt.want || (err == nil) != tt.ok || verify.CodeOf(err) != tt.code {
			t.Errorf("%s: %q, %v", tt.name, head, err)
		}
	}
}

func TestParcel(t *testing.T) {
	var b bytes.Buffer
	sent := parcel{refs: []HeadRef{{ID: verify.Digest{1}, Line: 1, Seq: 2}}, statuses: []agedStatus{{age: 1500e6, signed: []byte("signed")}}}
	if err := writeParcel(&b, sent); err != nil {
		t.Fatal(err)
	}
	kind, body, err := readFrame(&b)
	if refs, perr := parseRefs(body); kind != frameRefs || err != nil || perr != nil || len(refs) != 1 || refs[0] != sent.refs[0] {
		t.Errorf("%c %s %v %v", kind, body, err, perr)
	}
	kind, body, err = readFrame(&b)
	if kind != frameStatus || err != nil || binary.BigEndian.Uint32(body) != 1500 || string(body[4:]) != "signed" {
		t.Errorf("%c %s %v", kind, body, err)
	}
	if _, _, err := readFrame(&b); err != io.EOF {
		t.Errorf("the end is %v", err)
	}
}

func FuzzHeadRefs(f *testing.F) {
	good, err := json.Marshal([]HeadRef{{ID: verify.Digest{1}, Line: 1, Seq: 2}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`[{"id":"zz"}]`))
	f.Add([]byte(`[` + strings.Repeat(`{},`, 100) + `{}]`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if refs, err := parseRefs(b); err == nil && len(refs) > maxRefs {
			t.Fatalf("%d heads", len(refs))
		}
		r := bytes.NewReader(b)
		for {
			_, body, err := readFrame(r)
			if err != nil {
				break
			}
			if len(body) > maxStatusFrame {
				t.Fatalf("%d bytes", len(body))
			}
		}
	})
}
