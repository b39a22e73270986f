package control

import (
	"time"

	"meshupd/verify"
)

// The schemas of what is served. A schema only ever gains fields; a change of
// meaning gets a new number.
const (
	StatusSchema  = "meshupd.status/1"
	HistorySchema = "meshupd.history/1"
	ImportSchema  = "meshupd.import/1"
	VersionSchema = "meshupd.version/1"
	ErrorSchema   = "meshupd.error/1"
)

// State is the word for where a device stands. Only Confirmed counts as done.
type State string

// The states, in the order in which a device passes through them; the last three want a person's eye.
const (
	StateWaiting    State = "waiting"     // knows of the release, has nothing to do yet
	StateFetching   State = "fetching"    // bytes are coming
	StateFetched    State = "fetched"     // whole and verified in the store
	StateInstalled  State = "installed"   // written to the idle slot and read back
	StateTrial      State = "trial"       // started from the new slot, health not proven yet
	StateConfirmed  State = "confirmed"   // booted and healthy: done
	StateRolledBack State = "rolled-back" // the trial failed, the old version runs again
	StateBlocked    State = "blocked"     // cannot go on, see Reason
	StateSilent     State = "silent"      // not heard for 60 s
)

// States lists all states in that order.
var States = []State{StateWaiting, StateFetching, StateFetched, StateInstalled, StateTrial,
	StateConfirmed, StateRolledBack, StateBlocked, StateSilent}

// SiteStatus is the site as one device, the observer, sees it. Absent is not zero.
type SiteStatus struct {
	Schema      string         `json:"schema"` // StatusSchema; the server fills it in
	GeneratedAt time.Time      `json:"generated_at"`
	Generation  uint64         `json:"generation"` // for ?wait=; the server fills it in
	Observer    string         `json:"observer"`   // name of the device that answers
	Site        Site           `json:"site"`
	Release     *SiteRelease   `json:"release,omitempty"` // newest release accepted here
	Counts      map[State]int  `json:"counts"`            // devices by state; the server fills it in from Devices
	Bytes       Bytes          `json:"bytes"`
	Devices     []DeviceStatus `json:"devices"` // the observer first, then by name
	Alarms      []Alarm        `json:"alarms,omitempty"`
}

// Alarm is something about the publisher's keys that a person has to look into: two
// signed documents claim one place. The observer keeps to the one that came first.
type Alarm struct {
	Code  verify.Code   `json:"code"`
	Place string        `json:"place"` // "trust document 2", "release 1.17" (line and seq)
	Kept  verify.Digest `json:"kept"`
	Other verify.Digest `json:"other"`
}

// Site sums the devices up.
type Site struct {
	ID      string `json:"id"`      // short name of the product's trust root (and site key, if there is one)
	Devices int    `json:"devices"` // known, this one included
	Heard   int    `json:"heard"`   // of these, heard in the last 60 s
}

// SiteRelease is the release that the site moves to.
type SiteRelease struct {
	ID        verify.Digest `json:"id"`
	Product   string        `json:"product"`
	Version   string        `json:"version"`
	Channel   string        `json:"channel,omitempty"`
	Line      uint64        `json:"line"`
	Seq       uint64        `json:"seq"`
	Signer    string        `json:"signer,omitempty"`     // name of the first key that signed
	SignerFpr string        `json:"signer_fpr,omitempty"` // its fingerprint, upper-case hex
	Source    string        `json:"source,omitempty"`     // "usb", "lan" or "web": how it came to the observer
	Since     time.Time     `json:"since,omitzero"`       // when it was accepted here
	Notes     []string      `json:"notes,omitempty"`
}

// Bytes counts payload by where it came from, and the present rate.
type Bytes struct {
	USB  *int64   `json:"usb,omitempty"`
	LAN  *int64   `json:"lan,omitempty"`
	Web  *int64   `json:"web,omitempty"`
	Rate *float64 `json:"rate,omitempty"` // bytes per second over the last seconds, all devices together
}

// DeviceStatus is what a device said of itself, and when it was heard last.
type DeviceStatus struct {
	ID        string    `json:"id"` // peer id
	Name      string    `json:"name,omitempty"`
	Hardware  string    `json:"hardware,omitempty"`
	Version   string    `json:"version,omitempty"` // runs now
	Target    string    `json:"target,omitempty"`  // moves to
	State     State     `json:"state"`
	Since     time.Time `json:"since,omitzero"`
	LastHeard time.Time `json:"last_heard,omitzero"`
	Reason    *Reason   `json:"reason,omitempty"`
	Done      *int64    `json:"done,omitempty"` // bytes of the image being fetched or written
	Size      *int64    `json:"size,omitempty"`
	Rate      *float64  `json:"rate,omitempty"`   // bytes per second
	From      []string  `json:"from,omitempty"`   // names of the devices it takes from, most first
	Left      *int64    `json:"left_s,omitempty"` // seconds until the present state should end
	Sent      *int64    `json:"sent,omitempty"`   // payload bytes sent to other devices since it started
	Addrs     []string  `json:"addrs,omitempty"`
	Kept      []string  `json:"kept,omitempty"` // versions beside the slots, newest first: rollback --to
}

// Label is the name to show: the device's own, else its id.
func (d DeviceStatus) Label() string {
	if d.Name != "" {
		return d.Name
	}
	return d.ID
}

// Reason says why a device does not go on.
type Reason struct {
	Code      verify.Code `json:"code"`
	Detail    string      `json:"detail,omitempty"`
	NeedBytes int64       `json:"need_bytes,omitempty"` // with E-SPACE: how much more must be free
	Path      string      `json:"path,omitempty"`
	Retry     string      `json:"retry,omitempty"` // "auto": goes on by itself; "manual": needs a person
}

// Event is one line of history.
type Event struct {
	At     time.Time   `json:"at"`
	Device string      `json:"device"`           // name, else id
	From   string      `json:"from,omitempty"`   // version before
	To     string      `json:"to,omitempty"`     // version after
	Result string      `json:"result,omitempty"` // a State, or "imported", "refused", "started"
	Took   *float64    `json:"took_s,omitempty"` // seconds
	By     string      `json:"by,omitempty"`     // who began it: "mesh", "anna (uid 1000)"
	Why    string      `json:"why,omitempty"`
	Code   verify.Code `json:"code,omitempty"`
}

// History is the answer of /v1/history, newest first.
type History struct {
	Schema string  `json:"schema"`
	Events []Event `json:"events"`
}

// ImportInfo describes an import that was opened: the release held at the door, and what of it the device still lacks.
type ImportInfo struct {
	Schema   string        `json:"schema"`
	ID       string        `json:"id"` // names the import on this socket; the server fills it in
	Release  SiteRelease   `json:"release"`
	Running  string        `json:"running,omitempty"` // version that runs on this device
	Hardware []string      `json:"hardware,omitempty"`
	Images   []ImportImage `json:"images"` // in the manifest's order
}

// ImportImage is an image of the release.
type ImportImage struct {
	Name   string        `json:"name"`
	Digest verify.Digest `json:"digest"`
	Size   int64         `json:"size"` // bytes as distributed
	// Have is true when the image is whole in the store, or not wanted on this device: its bytes need not be sent.
	Have bool `json:"have"`
}

// VersionInfo says which build answers.
type VersionInfo struct {
	Schema   string `json:"schema"`
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Modified bool   `json:"modified,omitempty"` // built from a changed tree
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

// errorBody is a Refusal on the wire.
type errorBody struct {
	Schema string    `json:"schema"`
	Error  wireError `json:"error"`
}

type wireError struct {
	Code      verify.Code `json:"code"`
	Detail    string      `json:"detail"`
	NeedBytes int64       `json:"need_bytes,omitempty"`
}
