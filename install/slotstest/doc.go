// Package slotstest is what every install.Slots and every install.Bootloader has
// to pass: the life of a release told as stories, and the same stories with a
// fault, a killed daemon or a power cut at every durable step.
//
// A step fails in two ways, because a device cannot tell them apart: it failed
// and is lost, or it failed and is kept. It does not model a medium that lies
// about a sync.
package slotstest
