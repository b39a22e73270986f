package simnet

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience is how long a test waits for what should happen at once.
const patience = 20 * time.Second

// helperVar makes this test binary play a program that runs on a node.
const helperVar = "SIMNET_TEST_HELPER"

var notEntered error // why the tests of real sites cannot run

func TestMain(m *testing.M) {
	if role := os.Getenv(helperVar); role != "" {
		os.Exit(helper(role))
	}
	notEntered = Enter()
	if notEntered != nil && os.Getenv("CI") != "" {
		fmt.Fprintln(os.Stderr, "CI must have namespaces:", notEntered)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func helper(role string) int {
	switch role {
	case "available":
		fmt.Print(Available() == nil)
	case "look": // what is the network here?
		inode, _ := netnsInode()
		fmt.Println(inode)
		ifs, _ := net.Interfaces()
		for _, i := range ifs {
			fmt.Print(i.Name, " ")
		}
		fmt.Println()
		sys, _ := os.ReadDir("/sys/class/net")
		for _, e := range sys {
			fmt.Print(e.Name(), " ")
		}
		fmt.Println()
	case "family": // start a child, tell its pid, stay
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), helperVar+"=stay")
		if err := cmd.Start(); err != nil {
			fmt.Println(err)
			return 1
		}
		fmt.Println(cmd.Process.Pid)
		select {}
	case "stay":
		time.Sleep(10 * time.Minute)
	case "exit": // Enter, then leave with a code
		if err := Enter(); err != nil {
			fmt.Println("refused:", err)
			return 1
		}
		return 7
	case "site": // Enter, start something on a node, then stay
		if err := Enter(); err != nil {
			fmt.Println("refused:", err)
			return 1
		}
		if err := siteThatStays(); err != nil {
			fmt.Println("failed:", err)
			return 1
		}
	case "signal": // Enter, then wait for SIGTERM
		if err := Enter(); err != nil {
			fmt.Println("refused:", err)
			return 1
		}
		fmt.Println(os.Getpid())
		time.Sleep(10 * time.Minute)
	}
	return 0
}

func siteThatStays() error {
	s, err := NewSite(SiteConfig{})
	if err != nil {
		return err
	}
	n, err := s.AddNode(NodeConfig{})
	if err != nil {
		return err
	}
	cmd := asHelper("stay")
	cmd.Stdout = os.Stdout // held open as long as it lives
	if err := n.Start(cmd); err != nil {
		return err
	}
	fmt.Println("started")
	return cmd.Wait()
}

func asHelper(role string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperVar+"="+role)
	cmd.Stderr = os.Stderr
	return cmd
}

func newTestSite(t testing.TB) *Site {
	t.Helper()
	if notEntered != nil {
		t.Skip(notEntered)
	}
	s, err := NewSite(SiteConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func addNode(t testing.TB, s *Site, cfg NodeConfig) *Node {
	t.Helper()
	n, err := s.AddNode(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestEnterLeftTheMachinesNetwork(t *testing.T) {
	if notEntered != nil {
		t.Skip(notEntered)
	}
	here, err := netnsInode()
	if err != nil {
		t.Fatal(err)
	}
	if here == entered.outer {
		t.Fatal("still in the network namespace Enter was called from")
	}
	if err := Available(); err != nil {
		t.Errorf("entered, but Available says %v", err)
	}
	// The process outside is our parent; what it sees must not know our links.
	before := linksOf(t, os.Getppid())
	s := newTestSite(t)
	addNode(t, s, NodeConfig{})
	if after := linksOf(t, os.Getppid()); !slices.Equal(before, after) {
		t.Errorf("links outside were %v, are %v", before, after)
	}
	if inside := linksOf(t, os.Getpid()); len(inside) < 3 {
		t.Errorf("links inside are %v, want lo, a bridge and a port", inside)
	}
}

// linksOf lists the interfaces in the network of a process.
func linksOf(t *testing.T, pid int) []string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		if name, _, ok := strings.Cut(line, ":"); ok {
			names = append(names, strings.TrimSpace(name))
		}
	}
	slices.Sort(names)
	return names
}

func TestAvailableAgreesWithEnter(t *testing.T) {
	out, err := asHelper("available").Output()
	if err != nil {
		t.Fatal(err)
	}
	if want := strconv.FormatBool(notEntered == nil); string(out) != want {
		t.Errorf("Available says %s, Enter said %v", out, notEntered)
	}
}

func TestEnterHandsOnExitCode(t *testing.T) {
	if notEntered != nil {
		t.Skip(notEntered)
	}
	out, err := asHelper("exit").Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Fatalf("got %v and %q, want exit code 7", err, out)
	}
}

func TestEnterHandsOnSignals(t *testing.T) {
	if notEntered != nil {
		t.Skip(notEntered)
	}
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGKILL} {
		cmd := asHelper("signal")
		// A session of its own: no terminal delivers signals to it.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if inner := strings.TrimSpace(line); inner == strconv.Itoa(cmd.Process.Pid) {
			t.Fatalf("process %s is the outer one", inner)
		}
		cmd.Process.Signal(sig)
		// The inner process holds the pipe: it ends when that one is gone too.
		if _, err := io.Copy(io.Discard, out); err != nil {
			t.Fatal(err)
		}
		cmd.Wait()
		if sig != syscall.SIGKILL && cmd.ProcessState.ExitCode() != 128+int(sig) {
			t.Errorf("after %v: %v, want exit code %d", sig, cmd.ProcessState, 128+int(sig))
		}
	}
}

func TestKilledSiteTakesItsNodesAlong(t *testing.T) {
	if notEntered != nil {
		t.Skip(notEntered)
	}
	cmd := asHelper("site")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	if line, err := r.ReadString('\n'); line != "started\n" {
		t.Fatalf("%q, %v", line, err)
	}
	cmd.Process.Kill() // the process outside, which can tell nobody any more
	// Outside, inside and the node's command all hold the pipe.
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
}

func TestNewSiteNeedsEnter(t *testing.T) {
	entered.Lock()
	was := entered.yes
	entered.yes = false
	entered.Unlock()
	defer func() {
		entered.Lock()
		entered.yes = was
		entered.Unlock()
	}()
	if _, err := NewSite(SiteConfig{}); err == nil {
		t.Fatal("made a site in the machine's own network")
	}
}

func TestNodeSeesOnlyItsNetwork(t *testing.T) {
	s := newTestSite(t)
	n := addNode(t, s, NodeConfig{Name: "sensor"})
	cmd := asHelper("look")
	var out strings.Builder
	cmd.Stdout = &out
	if err := n.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	inode := strconv.FormatUint(n.space.inode, 10)
	if want := inode + "\nlo eth0 \neth0 lo \n"; out.String() != want {
		t.Errorf("the node saw %q, want %q", out.String(), want)
	}
	if here, _ := netnsInode(); strconv.FormatUint(here, 10) == inode {
		t.Error("the node shares our network")
	}
	err := n.Do(func() error {
		if in, _ := netnsInode(); in != n.space.inode {
			return fmt.Errorf("Do ran in namespace %d, want %s", in, inode)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if s.Isolated() != true || s.Shaped() != true {
		t.Error("a site of namespaces must say that it is isolated and shaped")
	}
}

func TestCloseKillsWholeFamilies(t *testing.T) {
	s := newTestSite(t)
	n := addNode(t, s, NodeConfig{})
	cmd := asHelper("family")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(cmd); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	grandchild, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the command survived")
	}
	// Close waits until they are dead; who inherited it may not have noticed yet.
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", grandchild))
	if err == nil && !strings.Contains(string(stat), ") Z ") {
		t.Errorf("the command's child survived: %s", stat)
	}
	if err := n.Start(asHelper("look")); err == nil {
		t.Error("started a command on a closed node")
	}
}

func TestMulticastReachesEveryNode(t *testing.T) {
	s := newTestSite(t)
	var nodes []*Node
	for range 3 {
		nodes = append(nodes, addNode(t, s, NodeConfig{}))
	}
	for _, group := range []string{"224.0.0.251", "ff02::fb"} {
		t.Run(group, func(t *testing.T) {
			ears := make([]*net.UDPConn, len(nodes))
			port := 0
			for i, n := range nodes {
				ears[i] = listenMulticast(t, n, group, port)
				port = ears[i].LocalAddr().(*net.UDPAddr).Port // the first picks it for all
			}
			for _, n := range nodes {
				word := "from " + n.Name()
				to := &net.UDPAddr{IP: net.ParseIP(group), Port: port}
				if to.IP.To4() == nil {
					to.Zone = "eth0"
				}
				sendDatagram(t, n, to, word)
				for j, ear := range ears { // its own too: multicast is looped back
					buf := make([]byte, 64)
					ear.SetReadDeadline(time.Now().Add(patience))
					k, from, err := ear.ReadFromUDPAddrPort(buf)
					if err != nil {
						t.Fatalf("%s did not hear %s: %v", nodes[j].Name(), n.Name(), err)
					}
					if string(buf[:k]) != word {
						t.Errorf("%s heard %q from %s, want %q", nodes[j].Name(), buf[:k], from, word)
					}
					if src := from.Addr().Unmap().WithZone(""); src != n.Addr4() && src != n.linkLocal() {
						t.Errorf("%s heard %s from %s", nodes[j].Name(), n.Name(), src)
					}
				}
			}
		})
	}
}

func listenMulticast(t *testing.T, n *Node, group string, port int) *net.UDPConn {
	t.Helper()
	var ear *net.UDPConn
	err := n.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		network := "udp4"
		if strings.Contains(group, ":") {
			network = "udp6"
		}
		ear, err = net.ListenMulticastUDP(network, eth0, &net.UDPAddr{IP: net.ParseIP(group), Port: port})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ear.Close() })
	return ear
}

func sendDatagram(t *testing.T, n *Node, to *net.UDPAddr, word string) {
	t.Helper()
	err := n.Do(func() error {
		// The zone's name means an interface of the node only to a socket there.
		c, err := net.DialUDP("udp", nil, to)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write([]byte(word))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestShapeHoldsBothDirections(t *testing.T) {
	s := newTestSite(t)
	const slow, fast = 20e6, 80e6 // bits per second
	hub := addNode(t, s, NodeConfig{Name: "hub"})
	slowUp := addNode(t, s, NodeConfig{UpBitsPerSec: slow, DownBitsPerSec: fast})
	slowDown := addNode(t, s, NodeConfig{UpBitsPerSec: fast, DownBitsPerSec: slow})
	// A busy machine can slow TCP down, nothing can speed it up: the best of some
	// tries tells about the link, and none may be above it.
	measure := func(from, to *Node, bits float64) (best float64) {
		t.Helper()
		for try := 0; try < 8 && best*8 < bits*0.94; try++ {
			rate, err := s.Goodput(from, to, int64(bits/8*0.4)) // 0.4 s worth
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s to %s: %.2f Mbit/s, %.1f %% of the link", from.Name(), to.Name(), rate*8/1e6, rate*8/bits*100)
			if rate*8 > bits*1.03 {
				t.Errorf("%.0f bit/s over a link of %.0f", rate*8, bits)
			}
			best = max(best, rate)
		}
		return best
	}
	up := measure(slowUp, hub, slow)
	upFast := measure(slowDown, hub, fast)
	down := measure(hub, slowDown, slow)
	downFast := measure(hub, slowUp, fast)
	for _, r := range []float64{upFast / up, downFast / down} {
		if r < 3 || r > 5 {
			t.Errorf("a link four times as fast was %.2f times as fast", r)
		}
	}
	tx, rx, err := slowUp.Counters()
	if err != nil {
		t.Fatal(err)
	}
	if sent, got := uint64(slow/8*0.4), uint64(fast/8*0.4); tx < sent || rx < got {
		t.Errorf("eth0 counted %d sent and %d received, want at least %d and %d", tx, rx, sent, got)
	}
	if err := slowUp.SetRate(0, 0); err != nil {
		t.Fatal(err)
	}
	free, err := s.Goodput(slowUp, hub, 32<<20)
	if err != nil {
		t.Fatal(err)
	}
	if free < 2*up {
		t.Errorf("%.0f byte/s without a limit, %.0f with one", free, up)
	}
}

// An echo server on one node, to ask over and over from another.
func serveEcho(t *testing.T, n *Node, at netip.Addr) netip.AddrPort {
	t.Helper()
	l, err := n.Listen("tcp", netip.AddrPortFrom(at, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	t.Cleanup(func() { l.Close() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func dialNode(t *testing.T, n *Node, to netip.AddrPort) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := n.Dial(ctx, "tcp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func echo(c net.Conn, word string, wait time.Duration) error {
	c.SetDeadline(time.Now().Add(wait))
	if _, err := io.WriteString(c, word); err != nil {
		return err
	}
	buf := make([]byte, len(word))
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	if string(buf) != word {
		return fmt.Errorf("got %q, want %q", buf, word)
	}
	return nil
}

func TestPulledCableStallsAndComesBack(t *testing.T) {
	s := newTestSite(t)
	a, b := addNode(t, s, NodeConfig{}), addNode(t, s, NodeConfig{})
	for _, at := range []netip.Addr{b.Addr4(), b.Addr6()} {
		c := dialNode(t, a, serveEcho(t, b, at))
		if err := echo(c, "hello", patience); err != nil {
			t.Fatal(err)
		}
		if err := b.SetLink(false); err != nil {
			t.Fatal(err)
		}
		if err := echo(c, "lost?", 300*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("with the cable pulled: %v, want silence", err)
		}
		if err := b.SetLink(true); err != nil {
			t.Fatal(err)
		}
		// TCP sends again what it could not deliver: the same bytes come late.
		c.SetDeadline(time.Now().Add(patience))
		buf := make([]byte, 5)
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "lost?" {
			t.Fatalf("after the cable was back: %q, %v", buf, err)
		}
	}
}

func TestPartitionSplitsAndHeals(t *testing.T) {
	s := newTestSite(t)
	a, b, c := addNode(t, s, NodeConfig{}), addNode(t, s, NodeConfig{}), addNode(t, s, NodeConfig{UpBitsPerSec: 10e6})
	at := serveEcho(t, b, b.Addr4())
	fromA, fromC := dialNode(t, a, at), dialNode(t, c, at)
	if err := s.Partition([]*Node{a, b}, []*Node{c}); err != nil {
		t.Fatal(err)
	}
	if err := echo(fromA, "same side", patience); err != nil {
		t.Errorf("within a group: %v", err)
	}
	if err := echo(fromC, "other side", 300*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("between groups: %v, want silence", err)
	}
	if err := s.Heal(); err != nil {
		t.Fatal(err)
	}
	fromC.SetDeadline(time.Now().Add(patience))
	if _, err := io.ReadFull(fromC, make([]byte, len("other side"))); err != nil {
		t.Errorf("after healing: %v", err)
	}
}

func TestLoopbackSiteSaysWhatItIs(t *testing.T) {
	s := NewLoopbackSite()
	defer s.Close()
	if s.Isolated() || s.Shaped() {
		t.Error("a loopback site claims more than it is")
	}
	a, b := addNode(t, s, NodeConfig{Name: "a", UpBitsPerSec: 1000}), addNode(t, s, NodeConfig{})
	if a.Addr4() == b.Addr4() {
		t.Errorf("two nodes at %s", a.Addr4())
	}
	c := dialNode(t, a, serveEcho(t, b, b.Addr4()))
	if err := echo(c, "hello", patience); err != nil {
		t.Error(err)
	}
	if from := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr(); from != a.Addr4() {
		t.Errorf("dialled from %s, want %s", from, a.Addr4())
	}
	if _, err := s.Goodput(a, b, 1<<20); err != nil {
		t.Error(err)
	}
	cmd := asHelper("stay")
	if err := a.Start(cmd); err != nil {
		t.Fatal(err)
	}
	_, _, countErr := a.Counters()
	for what, err := range map[string]error{"SetLink": a.SetLink(false), "SetRate": a.SetRate(1, 1), "Counters": countErr, "Partition": s.Partition()} {
		if !errors.Is(err, ErrLoopback) {
			t.Errorf("%s: %v, want ErrLoopback", what, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the command survived Close")
	}
}

// BenchmarkGoodput tells what part of a link's rate TCP carries as payload, which
// bounds everything measured on a site.
func BenchmarkGoodput(b *testing.B) {
	for _, mbit := range []int64{10, 100, 1000, 0} {
		b.Run(fmt.Sprintf("%dMbit", mbit), func(b *testing.B) {
			s := newTestSite(b)
			from := addNode(b, s, NodeConfig{UpBitsPerSec: mbit * 1e6})
			to := addNode(b, s, NodeConfig{DownBitsPerSec: mbit * 1e6})
			size := max(mbit, 10) * 1e6 / 8
			b.SetBytes(size)
			for b.Loop() {
				rate, err := s.Goodput(from, to, size)
				if err != nil {
					b.Fatal(err)
				}
				if mbit > 0 {
					b.ReportMetric(rate*8/float64(mbit*1e6)*100, "%link")
				}
			}
		})
	}
}

func BenchmarkAddNode(b *testing.B) {
	s := newTestSite(b)
	for i := 0; b.Loop() && i < maxNodes; i++ {
		addNode(b, s, NodeConfig{UpBitsPerSec: 1e8, DownBitsPerSec: 1e8})
	}
}
