package main

import (
	_ "github.com/BurntSushi/toml"
	_ "github.com/Masterminds/semver/v3"
	_ "github.com/ProtonMail/go-crypto/openpgp/v2"
	_ "github.com/anacrolix/torrent"
	_ "github.com/anacrolix/torrent/bencode"
	_ "github.com/anacrolix/torrent/merkle"
	_ "github.com/anacrolix/torrent/metainfo"
	_ "github.com/anacrolix/torrent/storage"
	_ "github.com/coreos/go-systemd/v22/daemon"
	_ "github.com/dustin/go-humanize"
	_ "github.com/hashicorp/mdns"
	_ "github.com/klauspost/compress/zstd"
	_ "github.com/libp2p/go-libp2p"
	_ "github.com/libp2p/go-libp2p-pubsub"
	_ "github.com/multiformats/go-multiaddr"
	_ "github.com/pelletier/go-toml/v2"
	_ "github.com/rogpeppe/go-internal/testscript"
	_ "github.com/spf13/cobra"
	_ "github.com/spf13/cobra/doc"
	_ "github.com/vishvananda/netlink"
	_ "github.com/vishvananda/netns"
	_ "golang.org/x/sync/errgroup"
	_ "golang.org/x/sys/unix"
	_ "golang.org/x/term"
	_ "golang.org/x/time/rate"
	_ "pgregory.net/rapid"
	_ "go.uber.org/goleak"
)

func main() {}
