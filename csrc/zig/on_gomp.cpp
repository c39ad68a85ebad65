// clang's OpenMP on gcc's runtime: what `parallel for` of csrc/cpu calls when clang compiles it.
//
// torch brings an OpenMP that speaks gcc's language; a wheel that brought clang's libomp would
// start threads of its own beside torch's. zig has neither. Taken is the one that torch itself was
// linked to: on x86-64 it is loaded for everyone, on aarch64 for torch alone.
#include <dlfcn.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastpo/openmp.h"

namespace fastpo {
namespace {

class Torch {
 public:
  template <class Function>
  void find(const char* name, Function*& function) const {
    function = handle_ == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(handle_, name));
    if (function == nullptr) {
      throw std::runtime_error(std::string("expected an OpenMP beside torch that has ") + name +
                               ", got none");
    }
  }

 private:
  // Whatever torch was linked to is looked through as well; it stays loaded as long as torch does.
  void* handle_ = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
};

struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  bool (*start)(long start, long end, long step, long chunk, long* from, long* to);
  bool (*next)(long* from, long* to);
  void (*end)();
  int (*thread)();
  int (*threads)();

  OpenMP() {
    const Torch torch;
    torch.find("GOMP_parallel", parallel);
    torch.find("GOMP_loop_dynamic_start", start);
    torch.find("GOMP_loop_dynamic_next", next);
    torch.find("GOMP_loop_end_nowait", end);
    torch.find("omp_get_thread_num", thread);
    torch.find("omp_get_num_threads", threads);
  }
};

const OpenMP& openmp() {
  static const OpenMP found;
  return found;
}

}  // namespace

void find_openmp() { openmp(); }

}  // namespace fastpo

struct ident_t;
using Body = void (*)(int32_t* thread, int32_t* bound, ...);

namespace {

using fastpo::openmp;

constexpr int kArguments = 8;
constexpr int32_t kStatic = 34;

struct Call {
  Body body;
  void* arguments[kArguments];
};

struct Loop {
  long from, end, chunk;
  bool started;
};

thread_local int32_t wanted = 0;
thread_local Loop loop;

// More arguments than the body takes are no matter to either calling convention.
void run(void* data) {
  const Call& call = *static_cast<const Call*>(data);
  int32_t thread = openmp().thread(), bound = thread;
  void* const* a = call.arguments;
  using Taking =
      void (*)(int32_t*, int32_t*, void*, void*, void*, void*, void*, void*, void*, void*);
  reinterpret_cast<Taking>(call.body)(&thread, &bound, a[0], a[1], a[2], a[3], a[4], a[5], a[6],
                                      a[7]);
}

}  // namespace

extern "C" {

int32_t __kmpc_global_thread_num(ident_t*) { return openmp().thread(); }

void __kmpc_push_num_threads(ident_t*, int32_t, int32_t threads) { wanted = threads; }

void __kmpc_fork_call(ident_t*, int32_t count, Body body, ...) {
  if (count > kArguments) __builtin_trap();
  Call call = {body, {}};
  va_list list;
  va_start(list, body);
  for (int32_t i = 0; i < count; ++i) call.arguments[i] = va_arg(list, void*);
  va_end(list);
  const auto threads = static_cast<unsigned>(wanted);
  wanted = 0;
  openmp().parallel(run, &call, threads, 0);
}

void __kmpc_serialized_parallel(ident_t*, int32_t) {}
void __kmpc_end_serialized_parallel(ident_t*, int32_t) {}

// Of an iteration space [*lower, *upper] each thread's part, the first ones one larger.
void __kmpc_for_static_init_8(ident_t*, int32_t, int32_t schedule, int32_t* last, int64_t* lower,
                              int64_t* upper, int64_t* stride, int64_t step, int64_t) {
  if (schedule != kStatic || step != 1) __builtin_trap();
  const int64_t threads = openmp().threads(), thread = openmp().thread();
  const int64_t all = *upper - *lower + 1, size = all / threads, rest = all % threads;
  *stride = all;
  *lower += thread * size + std::min(thread, rest);
  *upper = *lower + size + (thread < rest) - 1;
  *last = thread == threads - 1;
}

void __kmpc_for_static_fini(ident_t*, int32_t) {}

void __kmpc_dispatch_init_8(ident_t*, int32_t, int32_t, int64_t lower, int64_t upper, int64_t,
                            int64_t chunk) {
  loop = {lower, upper + 1, chunk, false};
}

int32_t __kmpc_dispatch_next_8(ident_t*, int32_t, int32_t*, int64_t* lower, int64_t* upper,
                               int64_t* stride) {
  long to = 0;
  const bool more = loop.started ? openmp().next(lower, &to)
                                 : openmp().start(loop.from, loop.end, 1, loop.chunk, lower, &to);
  loop.started = true;
  *upper = to - 1;
  *stride = 1;
  if (!more) openmp().end();
  return more;
}

void __kmpc_dispatch_deinit(ident_t*, int32_t) {}

}  // extern "C"
