"""Results: each figure of the paper as a labelled Dataset, from one node of the cube.

Each module holds the functions behind one subject of the paper. A function takes one node of the
cube (an `xarray.Dataset`) and returns a lazy Dataset whose attributes state the method, the figure
and the section of the paper; `clusters` and `paths` compute at once.

Map: `stability` (Fig. 1), `decomposition` (Figs. 2, 3, 10), `difficulty` (Fig. 4), `clusters`
(Figs. 5, 6), `curves` (Figs. 7, 9), `paths` (Fig. 8). Of section 4, with figures of our own:
`influence_by_layer` (12, 15), `removal_effects` (13), `method_scores` (14), `removal_sizes` (16),
`influential_samples` (17); of section 5, `subset_errors` (18) and `selected_samples` (19).
`analyse` has the table `RESULTS` and computes all of them together.

Variables of each result, by its key (dimensions in brackets):

`stability` and `snapshot_stability` (module `stability`)
    rank_correlation(reference, epoch, pair), rank_correlation_interval(reference, epoch, pair,
    bound), layer_rank_correlation(reference, epoch, layer, pair)
`decomposition` (module `decomposition`)
    importance_by_class(epoch, layer, label), importance_by_layer(epoch, layer), class_size(label),
    importance_by_fold(fold, epoch, layer), parameter_count(layer) if parameters are stored
`importance_groups` (module `decomposition`)
    importance_by_group(group, epoch, layer), share(group), share_by_layer(group, layer),
    group_size(group)
`importance_against_nll` (module `difficulty`)
    rank_correlation(epoch, layer), model_rank_correlation(epoch), overall_rank_correlation(),
    when_rank_correlation(), where_rank_correlation(layer), each but the first with
    `*_interval(bound)`; overall_importance(sample), final_nll(sample), mean_epoch(sample),
    layer_share(layer, sample), importance_by_difficulty(difficulty, epoch, layer),
    importance_by_difficulty_and_fold(difficulty, fold, epoch, layer), difficulty_size(difficulty)
`clusters` (module `clusters`; `sample` is the permanent index of the class's samples)
    profile(cluster, epoch, layer), cluster_of(sample), size(cluster), final_nll(sample),
    overall_importance(sample), nll_quantile(cluster, quantile), nll_quantile_by_epoch(cluster,
    epoch, quantile), representative(cluster, rank), mean_epoch(cluster), layer_share(cluster,
    layer); attributes label, class_name
`strategy_curves` (module `curves`)
    train_error, test_error, train_nll, test_nll (strategy, epoch), each with `*_se`;
    runs(strategy, epoch), diverged(strategy), diverged_epoch(strategy, seed),
    final_test_error(strategy, seed), train_error_by_seed(strategy, seed, epoch),
    class_nll(strategy, epoch, label)
`parameter_paths` (module `paths`)
    path(strategy, state, component), explained_variance_ratio(component), distance(strategy,
    other_strategy), travelled(strategy), fitted(strategy)
`importance_histogram` (module `decomposition`)
    count(bin), bin_edge(edge) in log10, zeros(), quantile(q), gini(), mean()
`influence_by_layer`
    mean_importance(epoch, layer), mean_influence(epoch, layer), adjoint_norm(epoch),
    mean_arriving(epoch, layer), share_left(epoch, layer), left_mean_epoch(sample),
    left_when_rank_correlation(), left_when_rank_correlation_interval(bound)
`removal_effects`
    predicted(removal, target), actual(removal, target, repeat), kind_of(removal),
    agreement(kind, target), agreement_of_repeats(kind, target), share_kept(kind), count(kind),
    left_out(kind)
`method_scores`
    score(predictor, kind), score_against_mean(predictor, kind), ceiling(kind),
    ceiling_against_mean(kind), unrolled_minus_fixed_point(kind), with `*_interval(..., bound)` of
    the first, the third and the last; score_by_damping(curvature, damping, kind), share_kept(kind),
    count(kind), left_out(kind), target_count(kind)
`removal_sizes`
    size(score, removal), actual_size(removal, repeat), kind_of(removal), count(kind);
    rank_correlation(score, kind), ceiling(kind) and above_ceiling_share(score, kind), each with
    `*_interval(..., bound)`
`influential_samples`
    position(target, end, rank), value(target, end, rank)
`subset_errors`
    error, error_se, count, diverged, penalised_error, difference_from_balanced with
    `*_interval(..., bound)`, variant and missing_classes (rule, size, budget); full_error(budget),
    full_error_se(budget), converged_error(), converged_error_se(), converged_error_interval(bound);
    smallest_size(rule, budget), smallest_size_interval(rule, budget, bound)
`selected_samples`
    kept(sample), overall_importance(sample), final_nll(sample), kept_count(label),
    class_size(label), position(group, rank), training_label(group, rank)
`claims` (package `sampimp.analysis.claims`)
    section, sentence, scope, number, value, low, high, side, threshold, rule, verdict (claim)
"""
