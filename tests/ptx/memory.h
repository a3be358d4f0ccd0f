// Functions of memory.cpp that the decoder and the fault messages use.
#pragma once
#include "warp.h"

void add_memory(Table&);
// Return the handler of a load or store: `count` elements of `bytes` bytes each. `wide`
// says that the register has 8 bytes, not 4.
Handler loader(bool is_signed, int bytes, int count, bool wide);
Handler storer(int bytes, int count, bool wide);
// Describe an address relative to the nearest array, for messages.
std::string nearest(const Launch&, u64 address);
