package publish

import (
	"os"
	"strconv"
	"time"

	"meshupd/verify"
)

// notAhead refuses a date more than a day ahead of this machine's clock: a slip of
// the pen in a signed date would move the proven time of every device.
func notAhead(issued time.Time) error {
	if latest := time.Now().AddDate(0, 0, 1); issued.After(latest) {
		return verify.Refuse(verify.CodeUsage, "the document is dated %s, and this clock says %s: correct the one that is wrong",
			issued.Format(time.RFC3339), time.Now().UTC().Format(time.RFC3339))
	}
	return nil
}

// Now is the time that goes into documents: SOURCE_DATE_EPOCH (seconds since
// 1970, reproducible-builds.org) when it is set, else the clock; whole seconds, UTC.
// It refuses with E-USAGE when the variable is not a number.
func Now() (time.Time, error) {
	value, ok := os.LookupEnv("SOURCE_DATE_EPOCH")
	if !ok || value == "" {
		return time.Now().UTC().Truncate(time.Second), nil
	}
	seconds, err := strconv.ParseInt(value, 10, 64)
	if err != nil || seconds < 1 {
		return time.Time{}, verify.Refuse(verify.CodeUsage, "SOURCE_DATE_EPOCH is %q, not a number of seconds", value)
	}
	return time.Unix(seconds, 0).UTC(), nil
}
