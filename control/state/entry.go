package state

// CheckEntry refuses what Encode did not make, or what a store would halt on: an entry that came over a wire, before it enters
// the log.
func CheckEntry(entry []byte) error {
	_, _, err := decode(entry)
	return err
}
