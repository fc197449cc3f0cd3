"""The element-wise kernels in C++, each of which reads and writes its data once. Compiled on the machine they run on."""
