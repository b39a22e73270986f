package verify

import "io/fs"

// OpenDoorWriting opens a door whose every durable write goes through write: a
// test can end it in a power cut.
func OpenDoorWriting(cfg DoorConfig, write func(path string, data []byte, perm fs.FileMode) error) (*Door, error) {
	cfg.write = write
	return OpenDoor(cfg)
}
