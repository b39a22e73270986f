package publish_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"meshupd/verify"
	"meshupd/verify/publish"
)

func certs(keys ...*publish.SecretKey) []*verify.Certificate {
	var out []*verify.Certificate
	for _, k := range keys {
		out = append(out, k.Certificate())
	}
	return out
}

// rotation is a trust folder of two of three root keys.
type rotation struct {
	t       *testing.T
	dir     string
	roots   []*publish.SecretKey
	release *publish.SecretKey
}

func newRotation(t *testing.T) *rotation {
	r := &rotation{t: t, dir: filepath.Join(t.TempDir(), "trust"), release: newKey(t, "Release")}
	for _, name := range []string{"R1", "R2", "R3"} {
		r.roots = append(r.roots, newKey(t, name))
	}
	wantCode(t, publish.InitTrust(r.dir, publish.TrustOptions{Product: "kiosk-a", Root: certs(r.roots...), RootThreshold: 2,
		Release: certs(r.release), Signers: r.roots[:2]}), "")
	return r
}

// copy is the folder on another machine.
func (r *rotation) copy() string {
	r.t.Helper()
	dir := filepath.Join(r.t.TempDir(), "copy")
	if err := os.CopyFS(dir, os.DirFS(r.dir)); err != nil {
		r.t.Fatal(err)
	}
	return dir
}

func (r *rotation) epoch() uint64 {
	r.t.Helper()
	v, err := publish.ShowTrust(r.dir)
	wantCode(r.t, err, "")
	return v.Documents[len(v.Documents)-1].Epoch
}

func TestNextTrustRotatesOnSeveralMachines(t *testing.T) {
	r := newRotation(t)
	fourth, fresh := newKey(t, "R4"), newKey(t, "Fresh")
	doc, err := publish.NextTrust(r.dir, publish.TrustChanges{
		AddRoot: certs(fourth), DropRoot: []string{r.roots[0].Fingerprint()[32:]}, AddRelease: certs(fresh),
		DropRelease: []string{r.release.Fingerprint()}, RaiseLine: true, ReleaseThreshold: 1,
	})
	wantCode(t, err, "")
	var said []string
	v, err := publish.ShowTrust(r.dir)
	wantCode(t, err, "")
	for _, c := range publish.DiffTrust(v.Documents[0], doc) {
		if c.What != "issued_at" { // the same second or not
			said = append(said, c.What+" "+v.Signers[c.Key].Name)
		}
	}
	const want = "epoch ,drop root key R1,add root key R4,drop release key Release,add release key Fresh,line "
	if got := strings.Join(said, ","); got != want {
		t.Errorf("the difference is %s, want %s", got, want)
	}
	if v.Proposal == nil || v.Proposal.Old.Missing() != 2 || v.Proposal.New.Missing() != 2 {
		t.Fatalf("the proposal is %+v", v.Proposal)
	}
	// Until it is complete the folder makes releases as before.
	if r.epoch() != 1 {
		t.Fatal("an unsigned proposal is in force")
	}
	// A second machine signs its copy, a third one signs with gpg; R1 may sign too, being root before.
	second := r.copy()
	p, done, err := publish.SignTrust(second, []*publish.SecretKey{r.roots[1]})
	if err != nil || done || p.Old.Missing() != 1 || p.New.Missing() != 1 {
		t.Fatalf("%+v, %v, %v", p, done, err)
	}
	if _, _, err := publish.SignTrust(r.dir, []*publish.SecretKey{newKey(t, "Stranger")}); verify.CodeOf(err) != verify.CodeSigKey {
		t.Fatalf("a stranger's signature: %v", err)
	}
	if _, _, err := publish.SignTrust(r.dir, []*publish.SecretKey{r.release}); verify.CodeOf(err) != verify.CodeSigKey {
		t.Fatalf("a release key's signature: %v", err)
	}
	p, done, err = publish.SignTrust(r.dir, []*publish.SecretKey{r.roots[0]})
	if err != nil || done || p.Old.Missing() != 1 || p.New.Missing() != 2 {
		t.Fatalf("%+v, %v, %v", p, done, err)
	}
	from, err := os.ReadFile(filepath.Join(second, "trust.next.sig"))
	wantCode(t, err, "")
	p, done, err = publish.SignTrust(r.dir, nil, from)
	if err != nil || done || p.Old.Missing() != 0 || p.New.Missing() != 1 {
		t.Fatalf("%+v, %v, %v", p, done, err)
	}
	g := newGnupg(t)
	secret, err := fourth.SecretArmored()
	wantCode(t, err, "")
	if _, err := g.try(string(secret), "--import"); err != nil {
		t.Fatal(err)
	}
	g.run("--armor", "--detach-sign", filepath.Join(r.dir, "trust.next.json"))
	p, done, err = publish.SignTrust(r.dir, nil)
	if err != nil || !done || r.epoch() != 2 {
		t.Fatalf("%+v, %v, %v", p, done, err)
	}
	left, _ := filepath.Glob(filepath.Join(r.dir, "trust.next*"))
	if len(left) != 0 {
		t.Fatalf("left %v", left)
	}
	_, _, err = publish.SignTrust(r.dir, nil)
	wantCode(t, err, verify.CodeNotFound)

	// The whole chain goes into a release, and a device with the first document takes it.
	image := filepath.Join(t.TempDir(), "x.img")
	wantCode(t, publish.GenerateImage(image, 1000, 1), "")
	factory := filepath.Join(t.TempDir(), "factory")
	if err := os.CopyFS(factory, os.DirFS(second)); err != nil {
		t.Fatal(err)
	}
	dir, err := publish.Create(t.Context(), publish.Options{Out: t.TempDir(), Trust: r.dir, Version: "2.0.0", Images: []publish.ImageInput{{Path: image}}})
	wantCode(t, err, "")
	wantCode(t, publish.Sign(dir, r.release), verify.CodeSigKey)
	wantCode(t, publish.Sign(dir, fresh), "")
	rel, err := publish.Verify(t.Context(), dir, factory, nil)
	wantCode(t, err, "")
	if m := rel.Manifest(); m.TrustEpoch != 2 || m.Line != 2 || m.Seq != 1 {
		t.Fatalf("the release is of epoch %d, place %d.%d", m.TrustEpoch, m.Line, m.Seq)
	}
}

func TestNextTrustRefusesNonsense(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(r *rotation) publish.TrustChanges
		want   verify.Code
	}{
		{"nothing", func(*rotation) publish.TrustChanges { return publish.TrustChanges{} }, verify.CodeUsage},
		{"below the threshold", func(r *rotation) publish.TrustChanges {
			return publish.TrustChanges{DropRoot: []string{r.roots[0].Fingerprint(), r.roots[1].Fingerprint()}}
		}, verify.CodeTrust},
		{"the last release key", func(r *rotation) publish.TrustChanges {
			return publish.TrustChanges{DropRelease: []string{r.release.Fingerprint()}}
		}, verify.CodeTrust},
		{"a threshold above the keys", func(*rotation) publish.TrustChanges { return publish.TrustChanges{RootThreshold: 4} }, verify.CodeTrust},
		{"a negative threshold", func(*rotation) publish.TrustChanges { return publish.TrustChanges{ReleaseThreshold: -1} }, verify.CodeTrust},
		{"a key that is there", func(r *rotation) publish.TrustChanges { return publish.TrustChanges{AddRoot: certs(r.roots[0])} }, verify.CodeTrust},
		{"a key that is not there", func(*rotation) publish.TrustChanges { return publish.TrustChanges{DropRoot: []string{"00000000AA"}} }, verify.CodeNotFound},
		{"an end too short to mean one", func(r *rotation) publish.TrustChanges {
			return publish.TrustChanges{DropRoot: []string{r.roots[0].Fingerprint()[33:]}}
		}, verify.CodeNotFound},
		{"min_seq out of range", func(*rotation) publish.TrustChanges { return publish.TrustChanges{MinSeq: 1 << 60} }, verify.CodeFormat},
		{"release_until in the past", func(*rotation) publish.TrustChanges {
			return publish.TrustChanges{ReleaseUntil: time.Unix(1_000_000_000, 0)}
		}, verify.CodeFormat},
		{"dated next week", func(*rotation) publish.TrustChanges {
			return publish.TrustChanges{RaiseLine: true, IssuedAt: time.Now().AddDate(0, 0, 7)}
		}, verify.CodeUsage},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRotation(t)
			before := tree(t, r.dir)
			_, err := publish.NextTrust(r.dir, c.change(r))
			wantCode(t, err, c.want)
			if c.want != verify.CodeFormat && tree(t, r.dir) != before {
				t.Error("left something behind")
			}
		})
	}
	r := newRotation(t)
	_, err := publish.NextTrust(r.dir, publish.TrustChanges{MinSeq: 9})
	wantCode(t, err, "")
	_, _, err = publish.SignTrust(r.dir, r.roots[:1])
	wantCode(t, err, "")
	_, err = publish.NextTrust(r.dir, publish.TrustChanges{MinSeq: 8})
	wantCode(t, err, verify.CodeUsage) // there is one already
	_, err = publish.NextTrust(r.dir, publish.TrustChanges{MinSeq: 8, Replace: true})
	wantCode(t, err, "")
	v, err := publish.ShowTrust(r.dir)
	wantCode(t, err, "")
	if v.Proposal == nil || len(v.Proposal.Old.Signers) != 0 || v.Proposal.Document.MinSeq != 8 {
		t.Fatalf("the new proposal is %+v", v.Proposal)
	}
	_, done, err := publish.SignTrust(r.dir, r.roots[1:])
	if err != nil || !done {
		t.Fatal(done, err)
	}
	_, err = publish.NextTrust(r.dir, publish.TrustChanges{MinSeq: 7})
	wantCode(t, err, verify.CodeTrust)
}

// A cut after the document got its place leaves a proposal file that means nothing any more.
func TestCutWhileAProposalComesIntoForce(t *testing.T) {
	r := newRotation(t)
	_, err := publish.NextTrust(r.dir, publish.TrustChanges{MinSeq: 9})
	wantCode(t, err, "")
	raw, err := os.ReadFile(filepath.Join(r.dir, "trust.next.json"))
	wantCode(t, err, "")
	_, done, err := publish.SignTrust(r.dir, r.roots)
	if err != nil || !done {
		t.Fatal(done, err)
	}
	if err := os.WriteFile(filepath.Join(r.dir, "trust.next.json"), raw, 0o644); err != nil {
		t.Fatal(err)
	}
	v, err := publish.ShowTrust(r.dir)
	if err != nil || v.Proposal != nil || len(v.Documents) != 2 {
		t.Fatalf("%+v, %v", v, err)
	}
	_, err = publish.NextTrust(r.dir, publish.TrustChanges{MinSeq: 10})
	wantCode(t, err, "")
}

func TestDevelopmentKeysCannotSignStable(t *testing.T) {
	dev, err := publish.NewKey(publish.KeyOptions{Name: "Acme", Development: true})
	wantCode(t, err, "")
	b := newBench(t, 1, dev.Certificate())
	dir := b.release("1.0.0")
	wantCode(t, publish.Sign(dir, dev), verify.CodeDevKey)
	raw, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	wantCode(t, err, "")
	sig, err := dev.DetachSign(raw, time.Now())
	wantCode(t, err, "")
	wantCode(t, publish.AddSignature(dir, sig), verify.CodeDevKey)
	place(t, dir, sig)
	wantCode(t, publish.Pack(t.Context(), dir, filepath.Join(b.out, "x.update"), nil), verify.CodeDevKey)
	_, err = b.verify(dir)
	wantCode(t, err, verify.CodeDevKey)
	beta, err := publish.Create(t.Context(), publish.Options{Out: b.out, Trust: b.anchor, Version: "1.1.0", Channel: "dev",
		Images: []publish.ImageInput{{Path: b.image}}})
	wantCode(t, err, "")
	wantCode(t, publish.Sign(beta, dev), "")
	_, err = b.verify(beta)
	wantCode(t, err, "")
}

func TestRecallsSBOMAndDates(t *testing.T) {
	key := newKey(t, "Acme")
	b := newBench(t, 1, key.Certificate())
	sbom := filepath.Join(t.TempDir(), "bom.cdx.json")
	if err := os.WriteFile(sbom, []byte(`{"bomFormat": "CycloneDX"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	create := func(change func(o *publish.Options), want verify.Code) string {
		t.Helper()
		o := publish.Options{Out: b.out, Trust: b.anchor, Images: []publish.ImageInput{{Path: b.image}}}
		change(&o)
		dir, err := publish.Create(t.Context(), o)
		wantCode(t, err, want)
		if want != "" {
			return ""
		}
		wantCode(t, publish.Sign(dir, key), "")
		_, err = b.verify(dir)
		wantCode(t, err, "")
		return dir
	}
	one := create(func(o *publish.Options) { o.Version, o.SBOM = "1.0.0", sbom }, "")
	if err := os.WriteFile(filepath.Join(one, publish.SBOMName), []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := b.verify(one)
	wantCode(t, err, verify.CodeDigest)

	word := create(func(o *publish.Options) { o.Version, o.Images, o.Recalls = "1.0.1", nil, []verify.Digest{{1}} }, "")
	next := create(func(o *publish.Options) { o.Version, o.Recalls = "1.1.0", []verify.Digest{{2}} }, "")
	for dir, want := range map[string]int{word: 1, next: 2} { // those before are withdrawn again
		u, err := publish.Inspect(dir)
		if err != nil || len(u.Manifest.Recalls) != want {
			t.Errorf("%s recalls %v (%v)", dir, u.Manifest.Recalls, err)
		}
	}
	create(func(o *publish.Options) { o.Version, o.Images = "1.2.0", nil; o.Previous = one }, verify.CodeUsage)
	create(func(o *publish.Options) { o.Version, o.IssuedAt = "1.2.0", time.Now().AddDate(0, 0, 2) }, verify.CodeUsage)
	create(func(o *publish.Options) { o.Version, o.SBOM = "1.2.0", sbom+".no" }, verify.CodeNotFound)
	// A release signed on a machine with a wrong clock is not signed a second time elsewhere.
	ahead := create(func(o *publish.Options) { o.Version = "1.3.0" }, "")
	path := filepath.Join(ahead, "manifest.json")
	raw, err := os.ReadFile(path)
	wantCode(t, err, "")
	m, err := verify.ParseUnverifiedManifest(raw)
	wantCode(t, err, "")
	m.IssuedAt = time.Now().UTC().AddDate(1, 0, 0).Truncate(time.Second)
	raw, err = verify.EncodeManifest(m)
	wantCode(t, err, "")
	if err := os.WriteFile(path, raw, 0o644); err != nil {
		t.Fatal(err)
	}
	wantCode(t, publish.Sign(ahead, key), verify.CodeUsage)
}

func TestExplainEndsWithTheImages(t *testing.T) {
	key := newKey(t, "Acme")
	b := newBench(t, 1, key.Certificate())
	dir := b.release("1.0.0")
	wantCode(t, publish.Sign(dir, key), "")
	dev := verify.Device{Product: "kiosk-a", Hardware: "x"}
	_, rules, err := publish.Explain(t.Context(), dir, b.anchor, dev, nil)
	wantCode(t, err, "")
	for _, r := range rules {
		if r.Verdict != verify.VerdictGood || r.Detail == "" {
			t.Errorf("%+v", r)
		}
	}
	images, err := filepath.Glob(filepath.Join(dir, "images", "*"))
	if err != nil || len(images) != 1 {
		t.Fatal(images, err)
	}
	raw, err := os.ReadFile(images[0])
	wantCode(t, err, "")
	raw[len(raw)-1] ^= 1
	if err := os.WriteFile(images[0], raw, 0o644); err != nil {
		t.Fatal(err)
	}
	_, again, err := publish.Explain(t.Context(), dir, b.anchor, dev, nil)
	wantCode(t, err, verify.CodeDigest)
	if len(again) != len(rules) || again[len(again)-1].Verdict != verify.VerdictRefused {
		t.Fatalf("the rules are %s", fmt.Sprint(again))
	}
}
