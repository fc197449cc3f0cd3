"""Kernels in C++, each of which reads and writes its data once; compiled on the machine they run on."""
