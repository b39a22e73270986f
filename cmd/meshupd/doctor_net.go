package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"golang.org/x/sys/unix"

	"meshupd/cmd/meshupd/internal/doctor"
	"meshupd/discovery"
)

func (p *patient) checkInterfaces(context.Context) doctor.Finding {
	addrs := listenAddrs(p.cfg.Mesh)
	if len(addrs) == 0 {
		return doctor.Fail("no interface that [mesh] chooses has a private address", "no neighbour can be reached until one has", "plug in the network, or correct mesh.interfaces")
	}
	var said []string
	for _, a := range addrs[:min(4, len(addrs))] {
		if !a.Addr().IsPrivate() && !a.Addr().IsLinkLocalUnicast() && !a.Addr().IsLoopback() {
			return doctor.Warn("mesh.listen has "+a.Addr().String()+", which is no private address", "whoever reaches it may talk to this device", "listen on private addresses only")
		}
		said = append(said, a.Addr().String())
	}
	if len(addrs) > 4 {
		said = append(said, fmt.Sprintf("%d more", len(addrs)-4))
	}
	return doctor.OK("%s", strings.Join(said, ", "))
}

// checkMulticast sends questions to the group of multicast DNS and wants to hear them.
func (p *patient) checkMulticast(ctx context.Context) doctor.Finding {
	seeds := "set mesh.seeds to neighbours by address"
	if !p.cfg.Mesh.MDNS {
		if len(p.cfg.Mesh.Seeds) == 0 {
			return doctor.Fail("mesh.mdns is off and mesh.seeds is empty", "this device finds nobody, and only those that have it as a seed find it", seeds)
		}
		return doctor.OK("off; %s instead", count(len(p.cfg.Mesh.Seeds), "seed"))
	}
	alone := "neighbours are not found by themselves"
	worst, said := doctor.Finding{}, []string{}
	for _, i := range interfacesOf(p.cfg.Mesh.Interfaces) {
		if i.Flags&net.FlagMulticast == 0 || len(privateAddrs([]net.Interface{i})) == 0 {
			continue
		}
		sent, heard, err := discovery.Probe(ctx, i.Name)
		switch {
		case err != nil && errors.Is(err, unix.EADDRINUSE):
			worst = doctor.Warn(err.Error(), "another program keeps port 5353 for itself: "+alone, "let it share the port (SO_REUSEADDR, in avahi disallow-other-stacks=no), or "+seeds)
		case err != nil:
			worst = doctor.Warn(err.Error(), alone, seeds)
		case heard == 0:
			worst = doctor.Warn(fmt.Sprintf("%s: 0 of %d own multicast probes came back", i.Name, sent), "a packet filter of this machine drops them: "+alone, "let 5353/udp through, or "+seeds)
		default:
			said = append(said, fmt.Sprintf("%s: %d of %d own probes came back", i.Name, heard, sent))
		}
	}
	switch {
	case worst.Level != "" && len(p.cfg.Mesh.Seeds) == 0:
		return worst
	case len(said) == 0 && len(p.cfg.Mesh.Seeds) == 0:
		return doctor.Warn("no interface that [mesh] chooses takes multicast", alone, seeds)
	case len(said) == 0:
		return doctor.OK("not possible; %s instead", count(len(p.cfg.Mesh.Seeds), "seed"))
	}
	return doctor.OK("%s (whether switches pass it on, `meshupd status` shows)", strings.Join(said, ", "))
}

// checkPort looks who has the port: the daemon when it runs, else nobody.
func (p *patient) checkPort(ctx context.Context) doctor.Finding {
	client := p.client()
	defer client.Close()
	_, err := client.Version(ctx)
	running := err == nil
	if p.cfg.Mesh.Port == 0 {
		return doctor.OK("any that is free")
	}
	var taken []string
	addrs := listenAddrs(p.cfg.Mesh)
	for _, a := range addrs {
		ln, err := net.Listen("tcp", a.String())
		if err == nil {
			ln.Close()
		} else if errors.Is(err, unix.EADDRINUSE) {
			taken = append(taken, a.String())
		}
	}
	switch {
	case running && len(taken) == 0 && len(addrs) > 0:
		return doctor.Warn(fmt.Sprintf("the daemon runs, and nobody listens on port %d", p.cfg.Mesh.Port), "neighbours cannot reach this device", "look at its log; was mesh.port changed since it was started?")
	case running:
		return doctor.OK("the daemon, or another program, listens on %s", strings.Join(taken, ", "))
	case len(taken) > 0:
		return doctor.Fail(strings.Join(taken, ", ")+" is in use, and the daemon does not answer", "the daemon cannot listen there", "end the other program, or set mesh.port")
	}
	return doctor.OK("port %d is free for the daemon", p.cfg.Mesh.Port)
}
