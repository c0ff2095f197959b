package servers

import "syscall"

// Tied makes a child process get sig when we die, however we do. It is really tied to the thread that starts it: the
// goroutine that does so must hold its thread (runtime.LockOSThread) until the child has ended.
func Tied(sig syscall.Signal) *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: sig} }
