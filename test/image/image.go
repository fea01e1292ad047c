// Package image tests what is shipped around the binary: the units and their sandboxes, the Debian package, and the image that
// `make image` made, which it boots in QEMU as a hypervisor would, without KVM. What it needs of the tools is installed by
// test/setup.sh image.
package image
