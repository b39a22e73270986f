package bootlab

import (
	"fmt"

	"meshupd/install"
)

// Story is one update of a disk with two whole slots: the slot it leaves and the slot it goes to, and the versions in them.
type Story struct {
	From, To      install.SlotName
	Before, After string
}

// Harm is what a power cut did to a disk.
type Harm string

// The harms, the worst first.
const (
	HarmNone  Harm = ""
	HarmBrick Harm = "brick"             // nothing would be started, or a slot that holds no whole release
	HarmWrong Harm = "wrong boot"        // a slot would be started, or is called whole, that was not verified or not chosen
	HarmLost  Harm = "lost confirmation" // it was promised, and the old release would be started
)

// Stand is how far a device has come with what it promised: the last marker of TRYING, ARMED, CONFIRMING, CONFIRMED,
// GIVING-UP and GAVE-UP, or "" before all of them. The others promise nothing.
type Stand Marker

// Move is the stand behind a marker.
func (s Stand) Move(m Marker) Stand {
	switch m {
	case MarkerTrying, MarkerArmed, MarkerConfirming, MarkerConfirmed, MarkerGivingUp, MarkerGaveUp:
		return Stand(m)
	}
	return s
}

// Judge holds what the bootloader would do against what was promised. holds names the version that a slot holds whole, or is "".
//
//	stand        next start      default
//	""           From            From
//	TRYING       From or To      From
//	ARMED        To, or From     From        (From when the bootloader has used up the trial)
//	CONFIRMING   any             From, or both are To
//	CONFIRMED    To              To
//	GIVING-UP    any             From
//	GAVE-UP      From            From
func (s Story) Judge(stand Stand, turn Turn, err error, holds func(install.SlotName) string) (Harm, string) {
	if err != nil {
		return HarmBrick, err.Error()
	}
	for _, slot := range []install.SlotName{turn.Next, turn.Default} {
		want := map[install.SlotName]string{s.From: s.Before, s.To: s.After}[slot]
		switch got := holds(slot); {
		case got == "":
			return HarmBrick, fmt.Sprintf("slot %s would be started and holds no whole release", slot)
		case got != want:
			return HarmWrong, fmt.Sprintf("slot %s would be started with %s, which was not chosen", slot, got)
		}
	}
	old, both := turn == Turn{s.From, s.From}, turn == Turn{s.To, s.To}
	switch Marker(stand) {
	case MarkerConfirmed:
		if !both {
			return HarmLost, fmt.Sprintf("confirmed, and the bootloader would start %+v", turn)
		}
		return HarmNone, ""
	case MarkerConfirming:
		if both {
			return HarmNone, ""
		}
	case "", MarkerGaveUp:
		if !old {
			return HarmWrong, fmt.Sprintf("nothing is armed, and the bootloader would start %+v", turn)
		}
	}
	if turn.Default != s.From {
		return HarmWrong, fmt.Sprintf("slot %s is the default before it was confirmed", turn.Default)
	}
	return HarmNone, ""
}
