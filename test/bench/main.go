// Command bench compares Varve with its peers on this machine in one interleaved run and prints ratios beside their goals.
package main

func main() {}
