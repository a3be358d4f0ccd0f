// What memory.cpp offers the decoder and the scheduler.
#pragma once
#include "warp.h"

void add_memory(Table&);
Handler loader(bool is_signed, int bytes, int count, bool wide);  // wide: the register
Handler storer(int bytes, int count, bool wide);
std::string nearest(const Launch&, u64 address);  // where an address lies, for messages
