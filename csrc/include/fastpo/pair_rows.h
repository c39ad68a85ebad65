// The three row kernels of fastpo/ops/rows/pair/backend.py over raw pointers: two heads, the same
// words.
//
// Tiles, strides and n == 0 are as in rows.h; state, constants, factors and sums are [fields, n].
// Side 0 is the student, side 1 the teacher.
#pragma once

#include <cstdint>

#include "fastpo/rows.h"

namespace fastpo {

enum class Divergence : int { kForwardKl = 0, kReverseKl, kJsd, kAlpha, kTvd };

// Rows of `state`; the first two belong to the student, + kPairStep they are the teacher's.
enum PairStateRow : int { kPairMax = 0, kPairMass = 1, kPairCross = 4, kPairMoment = 5 };

// Rows of `constants`, + kPairStep for the teacher: l = max((z - shift) - log_mass, kExcluded).
enum PairConstantRow : int { kPairShift = 0, kPairLogMass = 1 };
constexpr int kPairStep = 2;

// Rows of `factors`; kPairTotal + 1 is the teacher's.
enum PairFactorRow : int { kPairTotal = 0, kPairGrad = 2 };

// log p of a word that a head excludes: 0·(-inf - -inf) would be NaN.
constexpr float kExcluded = -1e30f;

// Exponents of the alpha divergence stop here.
constexpr float kLargestExponent = 40.0f;

// One head's part of a tile.
struct PairSide {
  const float* tile;  // [n, v] raw products
  int64_t tile_stride;
  const float* bias;  // [V] or null
  LogitMap map;
  float factor;  // dz/dx without the soft-cap
  void* out;     // [n, v] of pair_gradients; null: not wanted
  DType out_dtype;
  int64_t out_stride;
};

struct PairTile {
  PairSide sides[2];
  int64_t n, v;
  int64_t first;  // word of the tile's first column
};

struct PairRule {
  Divergence kind;
  double parameter;  // beta of kJsd, alpha of kAlpha
};

struct PairSoftmaxes : PairTile {
  float* state;  // [6, n], updated
  int64_t state_stride;
  int over;  // the side whose expectation kPairCross is; -1: not folded
  bool entropy;
};

struct PairValues : PairTile {
  PairRule rule;
  const float* constants;  // [4, n]
  int64_t constants_stride;
  double* sums;  // [3, n] of f, ∂f/∂l_student, ∂f/∂l_teacher: added to
  int64_t sums_stride;
};

struct PairGradients : PairTile {
  PairRule rule;
  const float* constants;  // [4, n]
  int64_t constants_stride;
  const float* factors;  // [3, n]
  int64_t factors_stride;
};

// As rows_forward_host. pair_gradients writes zeros, reading nothing, where kPairGrad is 0.
void pair_softmaxes_host(const PairSoftmaxes& work, int threads, int isa);
void pair_values_host(const PairValues& work, int threads, int isa);
void pair_gradients_host(const PairGradients& work, int threads, int isa);

}  // namespace fastpo
