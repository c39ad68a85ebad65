"""What the quantities mean, in the order of the table in docs/objectives.md."""

from __future__ import annotations

# `*_` stands for `chosen_` and `rejected_`.
MEANINGS = {
    # Pairs.
    "*_logps": "sum of a response's log-probabilities under the policy, nats",
    "ref_*_logps": "the same under the reference model",
    "prev_*_logps": "under the previous iterate of the policy",
    "mixed_*_logps": "under a mixture of policy and reference logits, renormalised",
    "history_*_logps": "under K past policies or references, one per row",
    "*_logratios": "log-probability under the policy minus that under the reference",
    "*_lengths": "number of scored tokens",
    "*_scores": "score of a response by a judge or a reward model, higher is better",
    "soft_labels": "probability that the chosen response is the better one",
    "margins": "margin by which it should win, in units of the logit",
    "pair_weights": "factor of a pair's loss",
    "third_logps": "log-probability of a third response: a rationale, a gold answer, a sample",
    "ref_third_logps": "the same under the reference",
    "third_lengths": "its number of scored tokens",
    "unlabeled_logps": "log-probability of responses without a preference label",
    "unlabeled_lengths": "their number of scored tokens",
    "prompt_embeddings": "a vector for each prompt, to measure how similar prompts are",
    # Pairs, token by token.
    "*_mask": "tokens that are scored",
    "*_token_logps": "log-probability of each token under the policy, nats",
    "ref_*_token_logps": "the same under the reference",
    "old_*_token_logps": "under the policy that sampled the responses",
    "*_token_weights": "factor of each token",
    "*_kl_weights": "factor of each token's divergence from the reference",
    "*_segments": "index of the phrase that a token belongs to, -1 for none",
    "*_token_kl": "KL of the whole next-word distribution from the reference, nats",
    "*_entropy": "entropy of the next-word distribution, nats",
    "*_log_sum_sq_probs": "log Σ p² of the next-word distribution",
    "rejected_alternative_token_logps": "log-probability of another word, drawn among the policy's"
    " best, in each token's place",
    # Single responses and groups.
    "logps": "sum of a response's log-probabilities under the policy, nats",
    "ref_logps": "the same under the reference",
    "sampler_logps": "under the distribution that the response was drawn from",
    "logratios": "log-probability under the policy minus that under the reference",
    "kl_logratios": "log-ratios of mismatched prompts and responses, for KTO's estimate of a KL",
    "lengths": "number of scored tokens",
    "scores": "score or reward of a response, higher is better; NaN: not known, which"
    " `group_advantages` and `rloo_advantages` take",
    "labels": "whether a row is desirable, chosen or in the preferred set",
    "groups": "index of the prompt (or annotator) that a row belongs to, ascending from 0",
    "sample_weights": "factor of a row's loss",
    "forward_kl": "KL of policy from reference, summed over the tokens",
    "steps": "number of steps of a trajectory",
    # Rollouts.
    "mask": "tokens that are scored",
    "token_logps": "log-probability of each token under the policy, nats",
    "old_token_logps": "under the policy before this batch's updates",
    "ref_token_logps": "under the reference",
    "sampler_token_logps": "as reported by the engine that sampled; NaN: not known",
    "teacher_token_logps": "under the teacher",
    "advantages": "how much better than expected a response is, or each token",
    "is_weights": "factor of the policy's term: importance weights, or a mask",
    "entropy": "entropy of the next-word distribution, nats",
    "token_reverse_kl": "KL(policy‖reference) of the next-word distribution, nats",
    "token_weights": "factor or reward of each token",
    "values": "the critic's value of a prompt or of each token",
    "old_values": "the same before this batch's updates",
    "returns": "the targets of the value regression",
    "segments": "index of the step that a token belongs to, -1 for none",
    # Distillation.
    "student_logits": "of the model that is trained, at each position",
    "teacher_logits": "of the teacher, at the same positions",
    "ref_teacher_logits": "of the teacher before it was aligned",
    "reverse_teacher_logits": "of a model trained on the pairs the other way round",
    "student_topk_logps": "log-probabilities of K listed words",
    "teacher_topk_logps": "the teacher's, of the same words",
    # Reward models.
    "*_rewards": "reward of a response by the reward model: a number, or a vector",
    "rewards": "the same for rows of groups, or for each objective",
    "ties": "whether two responses were judged equal",
    "objective_scores": "a score for each of M objectives",
    "reference_scores": "scores of a response to compare with",
    "label_logits": "logits of C candidate words",
    "label_ids": "index of the correct one",
    "anchors": "a user's point among the embeddings of responses",
    "user_weights": "a user's weights of D basic rewards",
    "latent_mean": "mean of the latent variable that represents a user",
    "latent_logvar": "logarithm of its variance",
    "eigenvalues": "weight of each plane in which two embeddings are compared",
    # Denoising.
    "*_errors": "squared error of the predicted noise or velocity",
    "ref_*_errors": "the same of the reference",
    "errors": "squared error of single samples",
    "timestep_weights": "factor of a pair's timestep",
    "*_score_gaps": "noise predicted by the teacher minus that of the auxiliary model",
    "*_displacements": "noised sample minus the sample",
}


def sides(name: str) -> tuple[str, ...]:
    """The names that stand behind one row."""
    if "*" not in name:
        return (name,)
    return tuple(name.replace("*", side) for side in ("chosen", "rejected"))
