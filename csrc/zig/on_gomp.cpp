// clang's OpenMP on gcc's runtime: what `parallel for` of csrc/cpu calls when clang compiles it.
//
// torch brings gcc's libgomp and has it loaded for everyone; a wheel that brought clang's libomp
// would start threads of its own beside torch's. zig has neither. The symbols are torch's, which is
// imported before.
#include <algorithm>
#include <cstdarg>
#include <cstdint>

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
bool GOMP_loop_dynamic_start(long start, long end, long step, long chunk, long* from, long* to);
bool GOMP_loop_dynamic_next(long* from, long* to);
void GOMP_loop_end_nowait();
int omp_get_thread_num();
int omp_get_num_threads();

struct ident_t;
using Body = void (*)(int32_t* thread, int32_t* bound, ...);

}  // extern "C"

namespace {

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
  int32_t thread = omp_get_thread_num(), bound = thread;
  void* const* a = call.arguments;
  using Taking =
      void (*)(int32_t*, int32_t*, void*, void*, void*, void*, void*, void*, void*, void*);
  reinterpret_cast<Taking>(call.body)(&thread, &bound, a[0], a[1], a[2], a[3], a[4], a[5], a[6],
                                      a[7]);
}

}  // namespace

extern "C" {

int32_t __kmpc_global_thread_num(ident_t*) { return omp_get_thread_num(); }

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
  GOMP_parallel(run, &call, threads, 0);
}

void __kmpc_serialized_parallel(ident_t*, int32_t) {}
void __kmpc_end_serialized_parallel(ident_t*, int32_t) {}

// Of an iteration space [*lower, *upper] each thread's part, the first ones one larger.
void __kmpc_for_static_init_8(ident_t*, int32_t, int32_t schedule, int32_t* last, int64_t* lower,
                              int64_t* upper, int64_t* stride, int64_t step, int64_t) {
  if (schedule != kStatic || step != 1) __builtin_trap();
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
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
  const bool more = loop.started
                        ? GOMP_loop_dynamic_next(lower, &to)
                        : GOMP_loop_dynamic_start(loop.from, loop.end, 1, loop.chunk, lower, &to);
  loop.started = true;
  *upper = to - 1;
  *stride = 1;
  if (!more) GOMP_loop_end_nowait();
  return more;
}

void __kmpc_dispatch_deinit(ident_t*, int32_t) {}

}  // extern "C"
