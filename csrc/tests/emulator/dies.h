// For tests of what the emulator detects.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

// Runs `body` in a child process: whether it aborts with `message`.
inline bool dies(const std::function<void()>& body, const char* message) {
  int pipes[2];
  if (pipe(pipes) != 0) exit(2);
  fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    dup2(pipes[1], 2);
    body();
    _exit(0);
  }
  close(pipes[1]);
  std::string text;
  char buffer[512];
  for (ssize_t n; (n = read(pipes[0], buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<size_t>(n));
  close(pipes[0]);
  int status = 0;
  waitpid(child, &status, 0);
  const bool good = WIFSIGNALED(status) && text.find(message) != std::string::npos;
  if (!good && *message != 0) printf("status %d, stderr: %s\n", status, text.c_str());
  return good;
}
