// What models of asynchronous hardware need from the emulator's scheduler.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "emulator.h"

namespace emu {

int threads();  // of the block
int thread_index();
const unsigned char* shared_begin();  // dynamic shared memory
size_t shared_size();

// Suspends this thread until `wake(waiting)`. `reason` is for the report of a deadlock: "threads wait for ...".
void suspend(std::vector<int>& waiting, Where where, std::function<std::string()> reason);
void wake(std::vector<int>& waiting);

// Lets other threads run, in random schedules.
void yield();

// `event` will run while the threads are suspended, at a moment of the scheduler's choice, in any order. Seeds 0 and 1
// delay events until no thread can continue.
void post(std::function<void()> event);

// Hopper's models: at the start of each block, and after its last thread has exited.
void begin_block_sm90();
void end_block_sm90();

}  // namespace emu
