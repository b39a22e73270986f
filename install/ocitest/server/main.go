// Command server is the service of the test images: it answers /health on the address in ADDR and prints its version.
//
//	MODE=sick    answers 500
//	MODE=crash   ends after a moment with a last word on standard error
package main

import (
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	fmt.Println("version", os.Getenv("VERSION"))
	if os.Getenv("MODE") == "crash" {
		time.Sleep(200 * time.Millisecond)
		fmt.Fprintln(os.Stderr, "no such pump")
		os.Exit(3)
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	if addr := os.Getenv("ADDR"); addr != "" {
		http.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) {
			if os.Getenv("MODE") == "sick" {
				w.WriteHeader(http.StatusInternalServerError)
			}
			fmt.Fprintln(w, os.Getenv("VERSION"))
		})
		go func() {
			fmt.Fprintln(os.Stderr, http.ListenAndServe(addr, nil))
			os.Exit(1)
		}()
	}
	<-ended
}
