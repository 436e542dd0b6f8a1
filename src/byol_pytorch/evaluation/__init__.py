"""What a backbone learned, by the published protocols: functions on tensors, no data sets."""

try:
    from byol_pytorch.evaluation.average_precision import average_precision
    from byol_pytorch.evaluation.features import extract_features, resnet_stages, shard
    from byol_pytorch.evaluation.knn import knn_accuracy, knn_predict
    from byol_pytorch.evaluation.linear import linear_probe
    from byol_pytorch.evaluation.neighbours import nearest_neighbours
    from byol_pytorch.evaluation.svm import low_shot_map, svm_map
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"byol_pytorch.evaluation needs {error.name}, which is not installed; its extra has all "
        'that it needs: pip install -e ".[eval]" from the checkout.',
        name=error.name,
    ) from error

__all__ = [
    "average_precision",
    "extract_features",
    "knn_accuracy",
    "knn_predict",
    "linear_probe",
    "low_shot_map",
    "nearest_neighbours",
    "resnet_stages",
    "shard",
    "svm_map",
]
