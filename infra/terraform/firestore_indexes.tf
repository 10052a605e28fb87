# infra/firestore.indexes.json is the only list of indexes, in the format of the Firebase CLI.

locals {
  firestore = jsondecode(file("${path.module}/../firestore.indexes.json"))

  firestore_indexes = {
    for index in local.firestore.indexes :
    join(" ", concat([index.collectionGroup], [for field in index.fields : "${field.fieldPath}:${try(field.order, field.arrayConfig)}"])) => index
  }

  firestore_fields = {
    for field in local.firestore.fieldOverrides : "${field.collectionGroup}.${field.fieldPath}" => field
  }
}
